"""The machine code of the Triton kernels keeps what makes them fast: see tools/static_costs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed")

ROOT = Path(__file__).parents[2]
RECORD = json.loads((ROOT / "benchmarks/results/static/h200.json").read_text())
DISASSEMBLER = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
# Without FASTGAN_TESTS=all: a few kernels of each kind, about ten seconds.
SAMPLE = (
    "norm.channel_moments BN f32",
    "norm.affine_sums LN 64x256K f32",
    "bias_act._backward lrelu nchw f32",
    "upfirdn2d._upfirdn2d blur cl f16",
)
# Kernels whose threads have their elements to themselves until the sums at a program's end: nothing to wait for in a
# loop, except that attention's tiles and the products of spectral norm pass through shared memory.
APART = ("norm.", "minibatch_discrimination.", "upfirdn2d.", "spectral_norm._finish", "spectral_norm._grad_weights")
TOLERANCE = 0.15  # of instructions per element

pytestmark = [
    pytest.mark.skipif(not DISASSEMBLER.exists(), reason="this Triton comes without nvdisasm"),
    pytest.mark.skipif(sys.platform != "linux", reason="Triton compiles for NVIDIA GPUs on Linux only"),
]


def name_of(row):
    return f"{row['kernel']} {row['case']} launch {row['launch']}"


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    target = tmp_path_factory.mktemp("static") / "rows.json"
    texts = ("",) if os.environ.get("FASTGAN_TESTS") == "all" else SAMPLE
    only = [argument for text in texts for argument in ("--only", text)]
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tools.static_costs", *only, "--json", str(target)]
    result = subprocess.run(command, env=env | {"PYTHONPATH": str(ROOT)}, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    rows = json.loads(target.read_text())
    assert len(rows) >= len(texts)
    return rows


def test_no_kernel_spills_registers(rows):
    # attention's second derivatives hold tiles of up to nine products; see the reasons in docs/gpu.md.
    ours = [row for row in rows if "grad_grad" not in row["kernel"] or "attention" not in row["kernel"]]
    assert [name_of(row) for row in ours if row["spills"]] == []


def test_no_loop_waits_at_a_barrier_where_threads_share_nothing(rows):
    apart = [row for row in rows if row["kernel"].startswith(APART) and row["floor_us"]]
    assert apart
    assert [(name_of(row), row["barriers"]) for row in apart if row["barriers"]] == []


def test_no_kernel_calls_a_division_in_its_loop(rows):
    # minibatch_stddev has no loop over its data: its only divisions are those of a program.
    data = [row for row in rows if row["floor_us"] and "stddev" not in row["kernel"]]
    assert data
    assert [name_of(row) for row in data if row["calls"]] == []


def test_norms_access_aligned_memory_in_128_bits(rows):
    float32 = [row for row in rows if row["kernel"].startswith("norm.") and row["case"].endswith("f32")]
    norms = [row for row in float32 if row["floor_us"] and "GN" not in row["case"]]
    assert norms
    # GroupNorm's parameters are loaded for each element, because a channel may end anywhere in a row.
    assert [name_of(row) for row in norms if row["wide"] < 0.7] == []


def test_instructions_per_element_are_those_of_the_record(rows):
    if RECORD["triton"] != triton.__version__:
        pytest.skip(f"recorded with Triton {RECORD['triton']}, this is {triton.__version__}")
    recorded = {name_of(row): row["instructions_per_element"] for row in RECORD["rows"]}
    found = {name_of(row): row["instructions_per_element"] for row in rows}
    assert found.keys() <= recorded.keys(), "run python -m tools.static_costs --write"
    apart = {
        name: (count, recorded[name])
        for name, count in found.items()
        if count is not None and abs(count - recorded[name]) > TOLERANCE * recorded[name]
    }
    assert apart == {}, "run python -m tools.static_costs --write if this is meant"
