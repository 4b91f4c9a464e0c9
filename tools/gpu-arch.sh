#!/bin/sh
# gpu-arch.sh: the compute capability of the first GPU as CMake writes it (90), or 90 where there is none.
capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1 | tr -cd '0-9')
echo "${capability:-90}"
