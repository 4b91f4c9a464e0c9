#!/bin/sh
# gpu.sh: builds, tests, verifies and times fastgan on this machine's NVIDIA GPU, in at most eight minutes.
#
# Needs no network and installs nothing: the system's python3 (PYTHON=... names another) brings torch, triton,
# pybind11, cmake, ninja and pytest.  Results go to $OUT, or to benchmarks/results.  A stage that fails does not
# keep the next from running; the exit status is non-zero if any did.
set -u
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python3}
out=${OUT:-benchmarks/results}
mkdir -p "$out"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
CUDAARCHS=${CUDAARCHS:-$(sh tools/gpu-arch.sh)}
export CUDAARCHS FASTGAN_BUILD=require FASTGAN_CUDA=require
failed=

stage() {
    name=$1 seconds=$2
    shift 2
    echo "== $name"
    start=$(date +%s)
    timeout --kill-after=5 "$seconds" "$@"
    status=$?
    [ $status -eq 0 ] || failed="$failed $name"
    case $status in
    0) result=ok ;;
    124 | 137) result="stopped after $seconds s" ;;
    *) result="failed ($status)" ;;
    esac
    echo "== $name: $result, $(($(date +%s) - start)) s"
}

# None of these needs tyro, the command line's parser of options.
verify='
import sys
from pathlib import Path
from fastgan.trainer.verify import VerifyConfig, verify
sys.exit(not verify(VerifyConfig(device="cuda", out=Path(sys.argv[1]))))
'
compiled='spectral_norm/sngan128/forward_backward'

stage build 110 "$python" setup.py --quiet build_native --inplace
stage info 15 "$python" -c 'import fastgan; print(fastgan.info())'
stage test 100 "$python" -m pytest -m gpu tests
stage verify 40 "$python" -c "$verify" "$out"
# What these do not come to is listed in their files, for --resume.
stage bench 90 "$python" -m fastgan.bench.run --device cuda --rounds 10 --minutes 1.1 --output "$out/ops.json"
stage bench-steps 90 "$python" -m fastgan.bench.run --device cuda --suite steps --rounds 5 --minutes 1.1 \
    --output "$out/steps.json"
stage bench-compiled 35 "$python" -m fastgan.bench.run --device cuda --case "$compiled" --compile \
    --output "$out/ops-compiled.json"

if [ -n "$failed" ]; then
    echo "failed:$failed"
    exit 1
fi
