"""The CUDA kernels compile without warnings and keep to their budget of registers, with no spills and no stack.

``FASTGAN_TESTS=all`` compiles them for every architecture of the record, and not only for one.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
# 512 threads a block share 65,536 registers; shared memory is all dynamic, its bound a static_assert in each source.
BUDGET = {"registers": 128, "stack": 0, "spill_stores": 0, "spill_loads": 0, "shared": 0}


@pytest.fixture(scope="module")
def built():
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on PATH")
    command = [sys.executable, str(HERE / "ptxas.py")]
    if os.environ.get("FASTGAN_TESTS") != "all":
        command += ["--quick"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def recorded():
    return json.loads((HERE / "ptxas_report.json").read_text())


def of_those_built(recorded, built):
    architectures = {name.split()[1] for name in built["kernels"]}
    return {name: used for name, used in recorded["kernels"].items() if name.split()[1] in architectures}


def test_every_kernel_built_here_keeps_to_the_budget(built):
    over = {
        name: (key, used[key], limit)
        for name, used in built["kernels"].items()
        for key, limit in BUDGET.items()
        if used[key] > limit
    }
    assert built["kernels"]
    assert not over


def test_the_record_names_the_kernels_that_are_built(built, recorded):
    assert of_those_built(recorded, built).keys() == built["kernels"].keys()


def test_the_record_is_what_this_compiler_says(built, recorded):
    if recorded["nvcc"] != built["nvcc"]:
        pytest.skip(f"recorded with nvcc {recorded['nvcc']}, this is {built['nvcc']}")
    assert of_those_built(recorded, built) == built["kernels"], "run tests/cuda/ptxas.py > tests/cuda/ptxas_report.json"


def test_every_recorded_kernel_keeps_to_the_budget(recorded):
    assert all(used[key] <= limit for used in recorded["kernels"].values() for key, limit in BUDGET.items())
