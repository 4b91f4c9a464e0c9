#!/bin/sh
# gpu-arch.sh: prints the compute capability of the first GPU in CMake's format, or 90 without a GPU.
capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1 | tr -cd '0-9')
echo "${capability:-90}"
