"""The work of each kernel, stated by hand, and the cost that its machine code predicts."""

from __future__ import annotations

from collections import Counter
from math import ceil, prod
from pathlib import Path
from typing import Any, NamedTuple

from tools.static_costs.by_hand import BY_HAND, Part, loop_parts
from tools.static_costs.launches import Launch
from tools.static_costs.machine_code import Function, disassemble, issue_cycles, latency_cycles, registers

# An H200.
SMS, CLOCK, BANDWIDTH = 132, 1.75e9, 4.8e12
L2_BYTES = 40e6  # of 50 MB; an estimate
SHARED = 233472  # bytes of an SM, of which the system takes 1 KiB per program


class Work(NamedTuple):
    """``once``: operands that have to move once. ``passes``: operands of each ``for`` over the data, in its order.

    "name@bytes" is an operand whose bytes per element are not its type's. An operand that is None moves nothing.
    """

    elements: str
    once: str = ""
    passes: tuple[str, ...] = ()


_GRAD_GRAD = "x dy h weight h_weight"
WORK = {
    "norm.normalize_rows": Work("rows", "x y", ("x", "x", "x weight bias y")),
    "norm.grad_rows": Work("rows", "dy x dx", ("x dy weight", "x dy weight dx")),
    "norm.grad_grad_rows": Work("rows", "h dy x by_dy by_x", (_GRAD_GRAD, f"{_GRAD_GRAD} h_bias by_dy by_x")),
    "norm.affine_sums": Work("samples", "dy x h", ("dy x h",)),
    "norm.channel_moments": Work("channels", "x", ("x", "x")),
    "norm.normalize_channels": Work("channels", "x y", ("x y",)),
    "norm.channel_products": Work("channels", "x dy h", ("x dy h",)),
    "norm.grad_channels": Work("channels", "x dy dx", ("x dy dx",)),
    "norm.grad_grad_channels": Work("channels", "x dy h by_dy by_x", ("x dy h by_dy by_x",)),
    "norm.row_statistics": Work("none"),
    "norm.row_means": Work("none"),
    "bias_act._activate": Work("size", "x y signs@.125 inside@.125"),
    "bias_act._backward": Work("size", "g x out signs@.125 inside@.125", ("g k x bias signs@1 inside@1 out",)),
    "bias_act._double_backward": Work("size", "h dy x by_dy by_x", ("h k dy x bias by_dy by_x",)),
    "minibatch_stddev._forward": Work("groups", "x y"),
    "minibatch_stddev._backward": Work("groups", "dy x dx"),
    "minibatch_stddev._double_backward": Work("groups", "h x by_dy by_x"),
    "minibatch_stddev._append": Work("none"),
    "minibatch_stddev._slopes": Work("none"),
}
_RESULTS = ("y", "dx", "by_dy", "by_x", "out")


def _elements(of: str, a: dict[str, Any], grid: tuple[int, ...]) -> int:
    if of == "rows":
        return a["size"] * grid[0]
    if of == "samples":
        return a["samples"] * a["channels"] * a["inner"]
    if of == "channels":
        samples = grid[0] // ceil(a["channels"] / a["TILE_C"])
        return samples * a["channels"] * a.get("segments", 1) * a["inner"]
    if of == "groups":
        return a["groups"] * a["SIZE"] * a["outer"] * a["features"] * a["run"]
    return a["size"] if of == "size" else 0


# Elements of a program in an iteration of a loop around those over the data.
_AROUND = {
    "norm.affine_sums": lambda a: a["TILE_C"] * a["inner"],
    **dict.fromkeys(("bias_act._backward", "bias_act._double_backward"), lambda a: a["TILE_C"] * a["inner_tiled"]),
}
# Iterations by depth of loops that are not over such data.
_TRIPS = {
    "norm.row_statistics": lambda a: [ceil(a["parts"] * a["channels"] // a["groups"] / a["BLOCK"])],
    "norm.row_means": lambda a: [ceil(a["channels"] // a["groups"] / a["BLOCK_C"]), ceil(a["parts"] / a["BLOCK_P"])],
    "minibatch_stddev._append": lambda a: [ceil(a["parts"] / (4 * a["BLOCK"]))],
    "minibatch_stddev._slopes": lambda a: [ceil(a["SIZE"] * a["outer"] * a["tail"] / a["BLOCK"])],
}


class Estimate(NamedTuple):
    """The work of a launch, and the instructions that a thread executes for it."""

    elements: float
    bytes: float  # that have to move once
    again: float  # bytes that L2 doesn't hold until they are read again
    operations: float  # seconds of the formula's operations
    parts: list[Part]
    notes: str


def cost(launch: Launch, metadata: Any, cubin: Path) -> dict[str, Any]:
    """Return a row of the table for a compiled launch."""
    kernel = launch.name.split(".")[1]
    function = disassemble(cubin)[kernel]
    use = registers(cubin)[kernel], metadata.shared, metadata.num_warps
    if launch.name in BY_HAND:
        hand = BY_HAND[launch.name](launch, function)
        estimate = Estimate(hand.elements, hand.bytes, 0, hand.operations, hand.parts, "~")
    else:
        estimate = _of_bytes(launch, function, use)
    return row(launch.name, launch.case, launch.number, prod(launch.grid), use, function, estimate)


def row(
    name: str, case: str, number: int, programs: int, use: tuple[int, int, int], function: Function, e: Estimate
) -> dict[str, Any]:
    """Return a row of the table. use: registers of a thread, shared memory and warps of a program."""
    resident, per_sm = resident_programs(*use), ceil(programs / SMS)
    floor = e.bytes / BANDWIDTH or e.operations
    times = {"floor": floor, "dram": (e.bytes + e.again) / BANDWIDTH}
    times["issue"] = per_sm * use[2] * sum(issue_cycles(p.trace) * p.times for p in e.parts) / 4 / CLOCK
    waits = sum(latency_cycles(p.trace, p.memory, 4 if i else 1) * p.times for i, p in enumerate(e.parts))
    times["latency"] = max(1, per_sm / resident) * waits / CLOCK
    hot = max((p.trace for p in e.parts[1:]), key=len, default=function.main)
    ops = Counter(i.base for i in hot)
    widths = Counter(f"{i.base[0]}{8 * i.width}" for i in hot if i.moves)
    bytes_moved = sum(i.moves for i in hot)
    each = e.elements / programs / (32 * use[2])
    return {
        "kernel": name,
        "case": case,
        "launch": number,
        "fraction": round(floor / max(times.values()), 3) if floor else None,
        "bound": max(times, key=lambda key: times[key]),
        **{f"{key}_us": round(value * 1e6, 1) for key, value in times.items()},
        "instructions_per_element": round(sum(len(p.trace) * p.times for p in e.parts) / each, 1) if each else None,
        "megabytes": round(e.bytes / 1e6, 1),
        "hot_loop": len(hot),
        "calls": ops["CALL"],
        "barriers": ops["BAR"],
        "spills": sum(i.base in ("STL", "LDL") for i in function.all),
        "widths": " ".join(f"{key}x{value}" for key, value in sorted(widths.items())),
        "wide": round(sum(i.moves for i in hot if i.width == 16) / bytes_moved, 2) if bytes_moved else None,
        "registers": use[0],
        "shared": use[1],
        "warps": use[2],
        "programs": programs,
        "resident": resident,
        "notes": e.notes,
    }


def _of_bytes(launch: Launch, function: Function, use: tuple[int, int, int]) -> Estimate:
    """Estimate a launch whose loops are over the bytes of its operands."""
    name, a, grid = launch.name, launch.arguments, launch.grid
    work = staged(WORK[name], a)
    programs = prod(grid)
    count = _elements(work.elements, a, grid)
    threads = 32 * use[2]
    each = count / programs / threads

    def size(operands: str, only: list[str] | None = None) -> float:
        total = 0.0
        for operand in operands.split():
            tensor_name, _, given = operand.partition("@")
            tensor = a.get(f"{tensor_name}_ptr")
            if tensor is not None and (only is None or operand in only):
                total += float(given) if given else tensor.element_size()
        return total

    reads = [operand for operand in work.once.split() if operand not in _RESULTS]
    in_flight = size(" ".join(reads)) * count * min(1, SMS * resident_programs(*use) / programs)
    missed = max(0, 1 - L2_BYTES / in_flight) if in_flight else 0
    again = sum(size(operands, reads) for operands in work.passes[1:]) * count * missed
    if name in _TRIPS:
        parts, notes = _small_parts(function, name, a), "~"
    else:
        parts, notes = _parts(function, name, work, a, each, threads, size, missed)
    return Estimate(count, count * size(work.once), again, 0, parts, notes)


def staged(work: Work, a: dict[str, Any]) -> Work:
    """Return the work of a launch: only a row's sums or results, or no operands that a tile has only one of."""
    if _by_channel(a):
        of_elements = (o for o in work.passes[0].split() if o not in ("k", "bias"))
        work = work._replace(passes=(" ".join(of_elements),))
    if a.get("STAGE") == "sums":
        reads = " ".join(operand for operand in work.once.split() if operand not in _RESULTS)
        return work._replace(once=reads, passes=work.passes[:-1])
    return work._replace(passes=work.passes[-1:]) if a.get("STAGE") == "results" else work


def _by_channel(a: dict[str, Any]) -> bool:
    """Tell whether a tile of an activation loads one value of a bias per channel."""
    return bool(a.get("BY_CHANNEL") and a["TILE_Q"] > 1)


def resident_programs(registers: int, shared: int, warps: int) -> int:
    of_registers = 65536 // (ceil(registers * 32 / 256) * 256 * warps)
    return max(1, min(32, 64 // warps, of_registers, SHARED // (shared + 1024)))


def _small_parts(function: Function, name: str, a: dict[str, Any]) -> list[Part]:
    return loop_parts(function, _TRIPS[name](a), "l2")


def _parts(
    function: Function,
    name: str,
    work: Work,
    a: dict[str, Any],
    each: float,
    threads: int,
    size: Any,
    missed: float,
) -> tuple[list[Part], str]:
    """Split a kernel into its loops over the data, those around them, and the rest. Elements are a thread's."""
    inner: dict[Any, list[tuple[int, int]]] = {}
    around = []
    for loop in function.loops:
        if function.moved(loop) and function.within(loop):
            around.append(loop)
        elif function.moved(loop):
            inner.setdefault(function.main[loop[1]].lines[0], []).append(loop)
    tile = a.get("BLOCK") or a.get("TILE_C", 1) * a.get("TILE_S", 1) * a.get("TILE_Q", 1)
    share = max(1, tile / threads)
    notes = "?" if len(inner) != len(work.passes) else ""
    run = _AROUND[name](a) / threads if around and name in _AROUND else each  # elements before a loop starts again
    # Elsewhere, loads of 32 bits are one value of a row or a channel.
    scalars = name != "norm.affine_sums" and not _by_channel(a)
    parts: list[Part] = []
    skip: set[int] = set()
    for index, (_, same) in enumerate(sorted(inner.items())):
        loop = max(same, key=function.moved)  # the one that ptxas unrolled
        operands = work.passes[min(index, len(work.passes) - 1)]
        elements = (function.moved(loop, scalars) or function.moved(loop)) / size(operands)
        notes += "?" if elements % share else ""
        times, left = divmod(run, elements) if elements > share else (run / elements, 0)
        for places, moves in function.remainders(loop) if elements > share else []:
            if left >= moves / size(operands):
                left -= moves / size(operands)
            else:
                skip.update(places)
        memory = "l2" if index and missed < 0.5 else "dram"
        parts.append(Part(function.trace(loop), times * each / run, memory))
    parts += [Part(function.trace(loop, skip), each / run, "dram") for loop in around]
    return [Part(function.trace(skip=skip), 1, "dram"), *parts], notes
