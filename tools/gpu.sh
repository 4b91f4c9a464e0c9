#!/bin/sh
# gpu.sh: builds, tests, verifies and times fastgan on this machine's NVIDIA GPU, in at most eight minutes.
#
# Needs no network and installs nothing.  The system's python3 (or PYTHON=...) must have torch, triton, pybind11,
# cmake, ninja and pytest, and for the trainer numpy, pillow, matplotlib and tqdm.  With pytest-xdist, tests run in
# parallel; without tyro, hypothesis and pytest-timeout, a few tests are left out.  Results go to $OUT or benchmarks/results:
# gpu.json has the result of each stage, gpu.log the output.  A failed stage does not stop the next one, but makes the
# exit status non-zero.  The most valuable stages come first: tests of native kernels, a sanitizer, each operation
# against its floor, whole steps, the trainer.
#
# SIMULATED=1 runs a rehearsal on a simulated device (tests/simulated_gpu), with a few cases per stage.  Stages that
# need a real device are reported as "not simulated".
set -u
cd "$(dirname "$0")/.." || exit 1
simulated=${SIMULATED:-}
[ "$simulated" != 0 ] || simulated=''
python=${PYTHON:-python3}
[ -z "$simulated" ] || [ -n "${PYTHON:-}" ] || python=.venv/bin/python
out=${OUT:-benchmarks/results}
mkdir -p "$out"
log=$out/gpu.log
: >"$log"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1
CUDAARCHS=${CUDAARCHS:-$(sh tools/gpu-arch.sh)}
# The GPU tests do not need the CPU kernels.
export CUDAARCHS FASTGAN_BUILD=auto FASTGAN_CUDA=require
end=$(($(date +%s) + 470))
slower=1
if [ -n "$simulated" ]; then
    export SIMULATED_GPU=1 SIMULATED_GPU_REFUSES=fastgan._native_cuda OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
    # A rehearsal for a machine that has only what must be there.
    export SIMULATED_GPU_HIDES=xdist,pytest_timeout,hypothesis,tyro,optuna PYTEST_DISABLE_PLUGIN_AUTOLOAD=1
    PYTHONPATH="$PWD/tests/simulated_gpu/python:$PYTHONPATH"
    slower=20  # an interpreter is slower than a GPU, even on few cases, and others may use the machine
    end=$(($(date +%s) + 470 * slower))
fi
failed=''
stages=''

left() { echo $((end - $(date +%s))); }

# stage NAME SECONDS COMMAND...: runs the command; programs that it starts with `limited` end within that time.
stage() {
    name=$1 seconds=$(($2 * slower))
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
    note "$(tail -n 1 "$log" | tr -cd 'A-Za-z0-9 .,:;()/=_-' | cut -c 1-160)"
}

# note WHAT: writes the result of the stage, so that it is kept if a later stage fails.
note() {
    echo "== $name: $result, $took s" | tee -a "$log"
    stages="$stages${stages:+,
}  {\"stage\": \"$name\", \"status\": $status, \"result\": \"$result\", \"seconds\": $took, \"said\": \"$1\"}"
    printf '[\n%s\n]\n' "$stages" >"$out/gpu.json"
}

# gpu_stage WHAT NAME SECONDS COMMAND...: a stage that needs a real device.
gpu_stage() {
    what=$1
    shift
    if [ -z "$simulated" ]; then
        stage "$@"
        return
    fi
    name=$1 status=0 took=0 result='not simulated'
    note "$what"
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
    [ -z "$simulated" ] || set -- -p simulated_gpu.pytest_plugin "$@"
    set -- -m gpu --continue-on-collection-errors "$@"
    has pytest_timeout && set -- --timeout 60 --timeout-method thread "$@"
    limited "$python" -m pytest "$@"
}

# Use many processes: most of the work is compiling, and a crash ends only one of them.
workers=$(nproc)
[ "$workers" -le 16 ] || workers=16  # nproc can count the whole machine's cores in a container
many_tests() (
    export OMP_NUM_THREADS=1
    if [ -n "$simulated" ]; then
        tests -q --share 1/200 "$@"
        return
    fi
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

bench_with='-m fastgan.bench.run'
few_ops='' few_steps='' more='tests/bench/test_cases.py tests/bench/test_timing.py tests/integrations'
verify_on="discs $out 32" train_on="discs $out 2000"
if [ -n "$simulated" ]; then
    bench_with=tests/simulated_gpu/rehearse_bench.py
    few_ops='--case norm/instance_norm/*' few_steps='--case d-step/wgan-gp/critic64-batch4' more='tests/integrations/test_cuda_graphs.py -k loss_alone'
    verify_on="ring8 $out 1" train_on="ring8 $out 3"
fi

# bench RESERVE FILE ARGUMENTS...: starts no case in the last RESERVE seconds.  After a crash another process continues.
# Cases that did not run stay listed for --resume.
bench() {
    reserve=$1 file=$out/$2
    shift 2
    set -- --output "$file" "$@"
    for _ in 1 2 3 4 5; do
        seconds=$((stop - $(date +%s) - reserve))
        [ $seconds -gt 0 ] || return 124
        minutes=$((seconds / 60)).$(printf %02d $((seconds % 60 * 10 / 6)))
        limited "$python" $bench_with --device cuda --keep-going --minutes "$minutes" "$@"
        status=$?
        case $status in 0 | 1 | 2 | 124 | 137) return $status ;; esac
        [ -s "$file" ] || return $status
        set -- --resume "$file"
    done
    return $status
}

# These stages do not use tyro, the command line's option parser.
verify='
import sys
from pathlib import Path
from fastgan.trainer.verify.verify import VerifyConfig, verify
name, out, steps = sys.argv[1:]
sys.exit(not verify(VerifyConfig(name, steps=int(steps), device="cuda", out=Path(out))))
'
train='
import sys
from pathlib import Path
from fastgan.trainer.config import TrainConfig
from fastgan.trainer.loop import Trainer
name, out, steps = sys.argv[1:]
config = TrainConfig(
    dataset=name, name="gpu-demo", runs=Path(out), steps=int(steps), minutes=0.5, device="cuda", overwrite=True
)
Trainer(config).train()
'
# One case of each operation with a CUDA kernel.  compute-sanitizer belongs to the CUDA toolkit, which may be missing.
sanitize() {
    for op in spectral_norm minibatch_discrimination; do
        limited compute-sanitizer --error-exitcode 9 "$python" -m pytest -q -m gpu -k cuda --share 1/40 \
            "tests/ops/test_$op.py" || return $?
    done
}
compiled='spectral_norm/sngan128/forward_backward' compiled_step='d-step/wgan-gp/critic64-batch16'
native='CUDA kernels, which nvcc compiles'
if [ -n "$simulated" ]; then
    # Whole games would keep Triton's interpreter busy for a quarter of an hour; the stages before run its kernels.
    without="from fastgan import backends; backends._MISSING['triton'] = lambda device_type: 'off for the rehearsal'"
    verify=$without$verify train=$without$train
fi

if [ -n "$simulated" ]; then
    stage build 100 limited "$python" -c 'from simulated_gpu.build import library; print(library())'
else
    stage build 140 build
fi
stage info 20 limited "$python" -c 'import fastgan; print(fastgan.info())'
gpu_stage "$native" test-cuda 30 tests tests/ops -k cuda
if [ -n "$simulated" ] || command -v compute-sanitizer >/dev/null; then
    gpu_stage "$native" sanitize 25 sanitize
fi
stage test 110 many_tests tests/ops -k 'not cuda'
stage bench 95 bench 40 ops.json --rounds 10 $few_ops
stage bench-steps $(($(left) / slower - 205)) bench 30 steps.json --suite steps --rounds 5 $few_steps
stage verify 40 limited "$python" -c "$verify" $verify_on
stage train 40 limited "$python" -c "$train" $train_on
gpu_stage 'Triton kernels that torch.compile makes' bench-compiled 35 \
    bench 20 ops-compiled.json --case "$compiled" --compile
gpu_stage 'graphs that torch.compile makes' bench-compiled-steps 40 \
    bench 30 steps-compiled.json --suite steps --rounds 3 --case "$compiled_step" --compile
gpu_stage "the host's time for a GPU" bench-host 15 bench 8 host.json --suite host --rounds 3
# This stage is last, because a failed capture can make the GPU unusable for the process.
stage test-more "$(($(left) / slower))" tests $more

if [ -n "$failed" ]; then
    echo "failed:$failed"
    exit 1
fi
