"""The table at the end of a run: rerouted calls with their work and times, and the reasons why others were not."""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from multiprocessing import util

from fastgan.launcher.timing import Unit, Way

HEAD = ("penalized call", "module", "steps", "work, PyTorch", "work, fastgan", "PyTorch", "fastgan", "kept")

NOTHING = ("fastgan: no gradient penalty was found in this run",)


class _Anchor:
    """multiprocessing calls a function that is registered for an object in each worker, while the object exists."""


_anchor = _Anchor()


def at_end(report: Callable[[], None], of_fork: Callable[[], Callable[[], None]] | None = None) -> None:
    """Call ``report`` when this process ends.

    Args:
        of_fork: called in each worker that this process forks. It returns the worker's report.
    """
    owner = os.getpid()
    done: list[bool] = []

    def once() -> None:
        if os.getpid() == owner and not done:
            done.append(True)
            report()

    def in_worker(_: _Anchor) -> None:
        # A worker ends without atexit, and forgets all finalizers when it starts.
        if os.getpid() == owner:
            util.Finalize(None, once, exitpriority=0)
        elif of_fork is not None:
            util.Finalize(None, of_fork(), exitpriority=0)

    atexit.register(once)
    util.register_after_fork(_anchor, in_worker)


def print_table(
    units: Sequence[Unit], refused: Mapping[str, str], notes: Sequence[str] = (), otherwise: Sequence[str] = ()
) -> None:
    """Print the table, or ``otherwise`` if it has no lines."""
    lines = table(units, refused, notes) or otherwise
    if lines and sys.stderr is not None:
        with suppress(OSError, ValueError):  # the script closed it, or its reader ended
            print("\n".join(lines), file=sys.stderr, flush=True)


def table(units: Sequence[Unit], refused: Mapping[str, str], notes: Sequence[str] = ()) -> list[str]:
    """Return the lines of the table, or no lines if there was no penalty and there are no notes."""
    seen = [unit for unit in units if unit.steps]
    if not seen and not refused and not notes:
        return []
    lines = ["fastgan: penalties of this run (work in forwards, time per step)"]
    if seen:
        rows = [HEAD, *map(_row, seen)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(HEAD))]
        lines += ["  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    lines += [
        f"  {unit.place}  {unit.name}: in the steps of {unit.within}"
        for unit in units
        if unit.within and not unit.steps
    ]
    lines += [f"  not rerouted: {where}: {reason}" for where, reason in refused.items()]
    lines += [f"  {note}" for note in notes]
    return lines


def _row(unit: Unit) -> tuple[str, ...]:
    plain, fused = unit.time(False), unit.time(True)
    return (
        unit.place,
        unit.name,
        str(unit.steps),
        _work(unit, False),
        _work(unit, True),
        _milliseconds(plain),
        _milliseconds(fused),
        _kept(unit, plain, fused),
    )


def _work(unit: Unit, is_fused: bool) -> str:
    if not unit.forward_work or is_fused not in unit.work:
        return "-"
    return f"{unit.work[is_fused] / unit.forward_work:.1f} F"


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1e3 * seconds:.3g} ms"


def _kept(unit: Unit, plain: float | None, fused: float | None) -> str:
    if unit.way is not Way.FASTER:
        return "fastgan (--always)"
    if unit.kept is None:
        return "too few steps to decide"
    if unit.kept:
        return f"fastgan, {plain / fused:.2f} times as fast" if plain and fused else "fastgan"
    return "PyTorch, as fast or faster"
