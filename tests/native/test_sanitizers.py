"""The CPU kernels over their whole test table, built with AddressSanitizer and UndefinedBehaviorSanitizer.

This takes minutes. It runs with FASTGAN_TESTS=all, and must be run after a change in csrc/cpu.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Imports the instrumented module under the name of the plain one, then runs the tests of the ops.
RUN = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("fastgan._native", sys.argv[1])
import torch, fastgan
sys.modules["fastgan._native"] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
import pytest
chosen = "cpu and not opcheck and not gradcheck"
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *sys.argv[2:], "-k", chosen]))
"""
# The ops with C++ kernels.
OPS = (
    *("activations", "attention_on_cpu", "avg_pool", "batch_norm", "bias_act", "conv", "conv_ways"),
    *(
        "conv_rows",
        "conv_weight_gradient",
        "conv_with_steps",
        "minibatch_discrimination",
        "minibatch_stddev",
        "norm",
        "norm_input",
    ),
    *("spectral_norm", "spectral_norm_tables", "stylegan_ops", "upfirdn2d"),
)
pytestmark = pytest.mark.long
CPU = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""


@pytest.fixture(scope="module")
def instrumented(tmp_path_factory) -> Path:
    if shutil.which("cmake") is None or shutil.which("g++") is None:
        pytest.skip("needs cmake and g++")
    build = tmp_path_factory.mktemp("sanitized")
    import pybind11

    options = {
        "FASTGAN_SANITIZE": "ON",
        "FASTGAN_WERROR": "ON",
        # One vector set is enough, without the baseline, because all compile the same sources.
        "FASTGAN_ISAS": "avx2" if {"avx2", "fma", "f16c"} <= set(CPU.split()) else "",
        "CMAKE_CXX_FLAGS_RELEASE": "-Og",
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
    }
    configure = ["cmake", "-S", "csrc", "-B", build, "-G", "Ninja", *(f"-D{k}={v}" for k, v in options.items())]
    for command in (configure, ["cmake", "--build", build]):
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
    return next(build.glob("_native.*.so"))


def test_the_cpu_kernels_run_clean_under_asan_and_ubsan(instrumented):
    libraries = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so", "libstdc++.so")
    ]
    environment = os.environ | {
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python itself does not free everything
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
        "PYTHONPATH": str(ROOT),
        "FASTGAN_TESTS": "thin",
    }
    result = subprocess.run(
        [sys.executable, "-c", RUN, instrumented, *(f"tests/ops/test_{op}.py" for op in OPS)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    assert " passed" in result.stdout


def test_the_sanitizers_see_a_planted_overflow(instrumented):
    """The instrumented build must detect a weight whose length is wrong."""
    libraries = subprocess.run(
        ["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    code = f"""
import ctypes, importlib.util
spec = importlib.util.spec_from_file_location("_native", {str(instrumented)!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
address = lambda n: libc.malloc(4 * n)
row = (address(12), address(12), address(3), address(5), address(9), 0, 1, 3, 5)
module.spectral_norm_forward("float32", [row], 1, 1e-12, False, 1)
"""
    environment = os.environ | {"LD_PRELOAD": libraries, "ASAN_OPTIONS": "detect_leaks=0"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.returncode != 0
    assert "heap-buffer-overflow" in result.stderr
