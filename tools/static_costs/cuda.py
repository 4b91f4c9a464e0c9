"""The CUDA kernels, compiled by nvcc. Loops are found by the text of their lines and of the lines that call them."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any

from tools.static_costs import cuda_spectral_norm
from tools.static_costs.by_hand import LANES, Part, text_of
from tools.static_costs.machine_code import Function, disassemble, registers
from tools.static_costs.model import Estimate, row

CSRC = Path(__file__).parents[2] / "csrc"
KERNELS, DIMS = 100, 16
# By kernel: operations of a pair and dim, samples j of a tile, bytes of shared memory.
_DISCRIMINATION = {
    "similarities_kernel": (2, 64, 18432),
    "gradients_kernel": (5, 64, 18432),
    "second_gradients_kernel": (9, 32, 21632),
}
_SAMPLES = 64  # i of a block

# Returns blocks, bytes of shared memory and warps of a block, and what they have to do.
Count = Callable[[Function], tuple[int, int, int, Estimate]]


def table(only: list[str], capability: int, folder: Path) -> list[dict[str, Any]]:
    """Return the rows of the kernels in float32, or none where nvcc is missing."""
    rows: list[dict[str, Any]] = []
    for source, cases in (
        ("minibatch_discrimination", _discriminations()),
        ("spectral_norm", cuda_spectral_norm.CASES),
    ):
        wanted = [each for each in cases if any(text in f"cuda.{each[0]} {each[1]}" for text in only)]
        if not wanted or shutil.which("nvcc") is None:
            continue
        cubin = folder / f"{source}.cubin"
        flags = ["-std=c++17", "-O3", "-lineinfo", f"-arch=sm_{capability}", f"-I{CSRC}", "-cubin"]
        subprocess.run(["nvcc", *flags, CSRC / f"cuda/{source}.cu", "-o", cubin], check=True)
        functions, in_use = disassemble(cubin), registers(cubin)
        for name, case, count in wanted:
            kernel = name.removeprefix("spectral_norm_")
            (mangled,) = (each for each in functions if f"{len(kernel)}{kernel}IfE" in each)
            programs, shared, warps, estimate = count(functions[mangled])
            use = in_use[mangled], shared, warps
            rows.append(row(f"cuda.{name}", case, 0, programs, use, functions[mangled], estimate))
    return rows


def _discriminations() -> list[tuple[str, str, Count]]:
    return [(k, f"MBD N{n} f32", partial(_discrimination, k, n)) for k in _DISCRIMINATION for n in (256, 4096)]


def _discrimination(kernel: str, n: int, function: Function) -> tuple[int, int, int, Estimate]:
    of_dim, others, shared = _DISCRIMINATION[kernel]
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
        text = text_of(*function.main[loop[1]].lines[0])
        times = next((count for key, count in trips.items() if key in text), 0)
        if times:
            parts.append(Part(function.trace(loop), times, "l2"))
    pairs = n * n * KERNELS
    estimate = Estimate(pairs, 0, 0, pairs * (of_dim * DIMS + 1) / LANES, parts, "~")
    return ceil(n / _SAMPLES) * KERNELS, shared, 4, estimate
