#!/bin/sh
# gpu.sh: builds, tests, verifies and times fastgan on this machine's NVIDIA GPU, in at most eight minutes.
#
# Needs no network and installs nothing: the system's python3 (PYTHON=... names another) brings torch, triton,
# pybind11, cmake, ninja and pytest, and tests go side by side if it has pytest-xdist.  Results go to $OUT, or to
# benchmarks/results: gpu.json says what became of each stage, gpu.log what it said.  A stage that fails does not keep
# the next from running; the exit status is non-zero if any did.
set -u
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python3}
out=${OUT:-benchmarks/results}
mkdir -p "$out"
log=$out/gpu.log
: >"$log"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1
CUDAARCHS=${CUDAARCHS:-$(sh tools/gpu-arch.sh)}
# Of the CPU's kernels the GPU's tests need none.
export CUDAARCHS FASTGAN_BUILD=auto FASTGAN_CUDA=require
end=$(($(date +%s) + 470))
failed=''
stages=''

left() { echo $((end - $(date +%s))); }

# stage NAME SECONDS COMMAND...: what it does with `limited` ends in that time.
stage() {
    name=$1 seconds=$2
    shift 2
    echo "== $name" | tee -a "$log"
    start=$(date +%s)
    from=$(($(wc -l <"$log") + 1))
    stop=$((start + seconds))
    [ "$stop" -le "$end" ] || stop=$end
    "$@" >>"$log" 2>&1
    status=$?
    took=$(($(date +%s) - start))
    [ $status -eq 0 ] || failed="$failed $name"
    case $status in
    0) result=ok ;;
    124 | 137) result="stopped after $took s" ;;
    *) result="failed ($status)" ;;
    esac
    tail -n "+$from" "$log" | tail -n 12 | cut -c 1-160
    echo "== $name: $result, $took s" | tee -a "$log"
    said=$(tail -n 2 "$log" | head -n 1 | tr -cd 'A-Za-z0-9 .,:;()/=_-' | cut -c 1-160)
    stages="$stages${stages:+,
}  {\"stage\": \"$name\", \"status\": $status, \"result\": \"$result\", \"seconds\": $took, \"said\": \"$said\"}"
    printf '[\n%s\n]\n' "$stages" >"$out/gpu.json"
}

limited() {
    seconds=$((stop - $(date +%s)))
    [ $seconds -gt 0 ] || return 124
    timeout --signal=INT --kill-after=5 $seconds "$@"
}

has() { "$python" -c "import $1" 2>/dev/null; }

build() {
    if "$python" -c 'import setuptools, sys; sys.exit(int(setuptools.__version__.split(".")[0]) < 77)'; then
        limited "$python" setup.py --quiet build_native --inplace
        return
    fi
    limited cmake -S csrc -B build/gpu -G Ninja -DFASTGAN_CUDA=ON -DPython_EXECUTABLE="$(command -v "$python")" \
        -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" &&
        limited cmake --build build/gpu && cp build/gpu/_native*.so fastgan/
}

tests() {
    set -- -m gpu --continue-on-collection-errors "$@"
    has pytest_timeout && set -- --timeout 60 --timeout-method thread "$@"
    limited "$python" -m pytest "$@"
}

# Compiling is most of the work, and a crash ends one process.
workers=$(nproc)
[ "$workers" -le 16 ] || workers=16  # the cores of a machine that a container has a part of
many_tests() (
    export OMP_NUM_THREADS=1
    if has xdist; then
        tests --numprocesses "$workers" --max-worker-restart 100 "$@"
        return
    fi
    pids='' result=0
    for part in $(seq "$workers"); do
        tests -q --share "$part/$workers" "$@" &
        pids="$pids $!"
    done
    for pid in $pids; do wait "$pid" || result=$?; done
    return $result
)

# bench RESERVE FILE ARGUMENTS...: no case begins in the last RESERVE seconds; another process goes on where one has
# crashed; cases not come to stay listed for --resume.
bench() {
    reserve=$1 file=$out/$2
    shift 2
    set -- --output "$file" "$@"
    for _ in 1 2 3 4 5; do
        seconds=$((stop - $(date +%s) - reserve))
        [ $seconds -gt 0 ] || return 124
        minutes=$((seconds / 60)).$(printf %02d $((seconds % 60 * 10 / 6)))
        limited "$python" -m fastgan.bench.run --device cuda --keep-going --minutes "$minutes" "$@"
        status=$?
        case $status in 0 | 1 | 2 | 124 | 137) return $status ;; esac
        [ -s "$file" ] || return $status
        set -- --resume "$file"
    done
    return $status
}

# None of these needs tyro, the command line's parser of options.
verify='
import sys
from pathlib import Path
from fastgan.trainer.verify.verify import VerifyConfig, verify
sys.exit(not verify(VerifyConfig(device="cuda", out=Path(sys.argv[1]))))
'
compiled='spectral_norm/sngan128/forward_backward'

stage build 140 build
stage info 20 limited "$python" -c 'import fastgan; print(fastgan.info())'
stage test-cuda 30 tests tests/ops -k cuda
stage test 120 many_tests tests/ops -k 'not cuda'
stage verify 55 limited "$python" -c "$verify" "$out"
stage bench 100 bench 40 ops.json --rounds 10
stage bench-steps $(($(left) - 70)) bench 40 steps.json --suite steps --rounds 5
stage bench-compiled 35 bench 20 ops-compiled.json --case "$compiled" --compile
# Last: a capture that fails may take the process's GPU with it.
stage test-more "$(left)" tests tests/bench/test_cases.py tests/bench/test_timing.py tests/integrations

if [ -n "$failed" ]; then
    echo "failed:$failed"
    exit 1
fi
