"""Work and iterations of kernels that do not loop over the bytes of their operands, counted by hand."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from math import ceil
from pathlib import Path
from typing import NamedTuple

from fastgan.ops.spectral_norm import triton_plan
from tools.static_costs.launches import Launch
from tools.static_costs.machine_code import Function, Instruction

# Operations in a second on an H200: lanes of 132 SMs, and dense products on tensor cores, from its data sheet.
LANES = 132 * 128 * 1.75e9
TENSOR = {"f16": 989e12, "tf32": 494e12}
L1_BYTES = 128e3  # of 256 KB: an estimate


class Part(NamedTuple):
    """Instructions that a warp executes ``times`` times, with loads from ``memory``."""

    trace: list[Instruction]
    times: float
    memory: str


class Hand(NamedTuple):
    """The work of a launch, and the instructions that a thread executes for it."""

    elements: float
    bytes: float  # that have to move once; 0 where operations are the floor
    operations: float  # seconds of the formula's operations
    parts: list[Part]


def loop_parts(function: Function, trips: list[float], memory: str) -> list[Part]:
    """Give each loop the iterations of its depth and of those around it."""
    parts = [Part(function.trace(), 1, "dram")]
    for loop in function.loops:
        times = 1.0
        for of_depth in trips[: 1 + sum(loop in function.within(other) for other in function.loops)]:
            times *= of_depth
        parts.append(Part(function.trace(loop), times, memory))
    return parts


def _discrimination(launch: Launch, function: Function) -> Hand:
    """A pair takes the operations that the docstring of the kernels states."""
    a = launch.arguments
    of_dim = 2 if launch.name.endswith("similarities") else 5 if a["w_ptr"] is None else 9
    pairs = a["samples"] * a["rows"] * a["kernels"]
    memory = "l1" if 4 * a["dims"] * a["samples"] <= L1_BYTES else "l2"  # the programs of a kernel share these tensors
    trips = [ceil(a["samples"] / (a["OTHERS"] * a["ACROSS"])), a["dims"]]
    return Hand(pairs, 0, pairs * (of_dim * a["dims"] + 1) / LANES, loop_parts(function, trips, memory))


def _filter(launch: Launch, function: Function) -> Hand:
    """Count lines of the input that loops add, if there are too many taps for the compiler to write all lines."""
    a = launch.arguments
    x, y = a["x_ptr"], a.get("y_ptr", a.get("z_ptr"))
    bits = a["bits_ptr"].nbytes if "bits_ptr" in a else 0
    each = ceil(a["TILE_Y"] * a["TILE_X"] / 128) * ceil(a["TAPS_X"] / a["UP_X"])  # elements of a thread in a line
    lines = 3 * a["DOWN_Y"] + ceil(a["TAPS_Y"] / a["UP_Y"])
    parts = [Part(function.trace(), 1, "dram")]
    for loop in function.loops:
        trace = function.trace(loop)
        elements = sum(i.moves for i in trace if i.base == "LDG" and _is_data(i)) / x.element_size()
        if elements:
            parts.append(Part(trace, lines * each / elements, "dram"))
    return Hand(y.numel(), x.nbytes + y.nbytes + bits, 0, parts)


def _is_data(instruction: Instruction) -> bool:
    return not any("taps_ptr" in _text_of(file, line) for file, line in instruction.lines[:1])


# Products of a pair (row, key) by kernel: of operands as they are stored, and of P and the like.
_PRODUCTS = {
    "attend": (1, 1),
    "grad_rows": (2, 1),
    "grad_keys": (2, 2),
    "grad_grad_rows": (5, 4),
    "grad_grad_keys": (5, 3),
}


def _attention(launch: Launch, function: Function) -> Hand:
    """Products of float32 run on the lanes unless TF32 is allowed; P stays in float32, so its products are TF32."""
    a = launch.arguments
    q, (stored, of_p) = a["q_ptr"], _PRODUCTS[launch.name.split(".")[1]]
    pairs = q.shape[0] * q.shape[1] * a["length"] * a["keys"]
    flops = 2 * pairs * a["E"]
    if q.element_size() == 2:
        seconds = flops * (stored / TENSOR["f16"] + of_p / TENSOR["tf32"])
    else:
        seconds = flops * (stored + of_p) / (2 * LANES)
    trips = [a["keys"] / a["KEYS"] if launch.name.endswith(("attend", "rows")) else a["length"] / a["ROWS"]]
    return Hand(pairs, 0, seconds, loop_parts(function, trips, "l2"))


def _is_of_form(function: Function, loop: tuple[int, int], form: int) -> bool:
    name = ("GENERAL", "RUNS", "ALONG", "ACROSS", "VECTORS")[form]
    return any(f"result, {name}, " in _text_of(file, line) for file, line in function.main[loop[1]].lines)


@lru_cache
def _lines_of(file: str) -> list[str]:
    return Path(file).read_text().splitlines()


def _text_of(file: str, line: int) -> str:
    return _lines_of(file)[line - 1]


def _spectral_norm(launch: Launch, function: Function) -> Hand:
    """The table of weights tells which of the loops run: a kernel has one for each form of a weight.

    All programs read the table and the sums of squares, before and after a loop: these come from L2.
    """
    a = launch.arguments
    field = {name: i for i, name in enumerate(triton_plan.FIELDS)}
    rows = a["layers_ptr"].tolist()
    size = sum(row[field["outer"]] * row[field["rows"]] * row[field["inner"]] for row in rows)
    item = a["DTYPE"].primitive_bitwidth // 8
    threads = 32 * launch.options.num_warps
    each = size / launch.grid[0] / threads
    of_t = bool(a.get("OF_T"))
    form = rows[0][field["t_form" if of_t else "s_form"]]
    narrow = launch.name.endswith("product") and form in (triton_plan.GENERAL, triton_plan.RUNS)
    inner = [loop for loop in function.loops if not function.within(loop) and function.moved(loop)]
    if launch.name.endswith("product"):  # the call of this form is among the lines into which its loop is compiled
        inner = [loop for loop in inner if _is_of_form(function, loop, form)]
    wide = [loop for loop in inner if any(i.width == 16 and i.moves for i in function.trace(loop))]
    chosen = max([loop for loop in inner if (loop in wide) != narrow], key=lambda loop: len(function.trace(loop)))
    step = (triton_plan.SMALL_BLOCK if narrow else triton_plan.BLOCK) / threads
    parts = [Part(function.trace(), 1, "l2"), Part(function.trace(chosen), each / step, "dram")]
    if launch.name.endswith("product"):
        row = rows[0]
        columns = row[field["outer"]] * row[field["inner"]]
        long = row[field["rows"]] if of_t else columns
        block = triton_plan.outputs_per_step(form, of_t, item)
        around = next(loop for loop in function.loops if chosen in function.within(loop))
        parts.append(Part(function.trace(around), each * threads / (block * long), "l2"))
    reads = {"_product": 1, "_finish": 2, "_inner_products": 2, "_grad_weights": 2}[launch.name.split(".")[1]]
    return Hand(size, reads * size * item, 0, parts)


BY_HAND: dict[str, Callable[[Launch, Function], Hand]] = {
    **dict.fromkeys(("minibatch_discrimination._similarities", "minibatch_discrimination._gradients"), _discrimination),
    "upfirdn2d._upfirdn2d": _filter,
    "filtered_lrelu._activated": _filter,
    **dict.fromkeys((f"attention.{name}" for name in _PRODUCTS), _attention),
    **{f"spectral_norm.{name}": _spectral_norm for name in ("_product", "_finish", "_inner_products", "_grad_weights")},
}
