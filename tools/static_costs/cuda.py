"""The CUDA kernels of minibatch discrimination, compiled by nvcc. Loops are found by the text of their lines."""

from __future__ import annotations

import shutil
import subprocess
from math import ceil
from pathlib import Path
from typing import Any

from tools.static_costs.by_hand import LANES, Part
from tools.static_costs.machine_code import Function, disassemble, registers
from tools.static_costs.model import Estimate, row

CSRC = Path(__file__).parents[2] / "csrc"
KERNELS, DIMS = 100, 16
# By kernel: operations of a pair and dim, samples j of a tile, bytes of shared memory.
_KERNELS = {
    "similarities_kernel": (2, 64, 18432),
    "gradients_kernel": (5, 64, 18432),
    "second_gradients_kernel": (9, 32, 21632),
}
_SAMPLES = 64  # i of a block


def table(only: list[str], capability: int, folder: Path) -> list[dict[str, Any]]:
    """Return the rows of the kernels in float32, or none where nvcc is missing."""
    named = [f"cuda.{kernel} MBD N{n} f32" for kernel in _KERNELS for n in (256, 4096)]
    if shutil.which("nvcc") is None or not any(text in name for name in named for text in only):
        return []
    source, cubin = CSRC / "cuda/minibatch_discrimination.cu", folder / "cuda.cubin"
    flags = ["-std=c++17", "-O3", "-lineinfo", f"-arch=sm_{capability}", f"-I{CSRC}", "-cubin"]
    subprocess.run(["nvcc", *flags, source, "-o", cubin], check=True)
    lines = source.read_text().splitlines()
    rows = []
    for mangled, function in disassemble(cubin).items():
        kernel = next((name for name in _KERNELS if f"{len(name)}{name}IfE" in mangled), None)
        if kernel is not None:
            sizes = [n for n in (256, 4096) if any(text in f"cuda.{kernel} MBD N{n} f32" for text in only)]
            rows += [_row(kernel, n, function, registers(cubin)[mangled], lines) for n in sizes]
    return rows


def _row(kernel: str, n: int, function: Function, in_use: int, lines: list[str]) -> dict[str, Any]:
    of_dim, others, shared = _KERNELS[kernel]
    tiles = ceil(n / others)
    trips = {
        "j0 < t_.samples": tiles / 2,  # of two branches, one for whole tiles off the diagonal, a tile takes one
        "c0 < t_.dims": tiles,
        "c0 < c_end_": tiles,
        "c < depth": tiles * DIMS,
        "at < width * kOwn": DIMS * _SAMPLES / 128,
    }
    parts = [Part(function.trace(), 1, "dram")]
    for loop in function.loops:
        text = lines[function.main[loop[1]].lines[0][1] - 1]
        times = next((count for key, count in trips.items() if key in text), 0)
        if times:
            parts.append(Part(function.trace(loop), times, "l2"))
    pairs = n * n * KERNELS
    estimate = Estimate(pairs, 0, 0, pairs * (of_dim * DIMS + 1) / LANES, parts, "~")
    use = in_use, shared, 4
    return row(f"cuda.{kernel}", f"MBD N{n} f32", 0, ceil(n / _SAMPLES) * KERNELS, use, function, estimate)
