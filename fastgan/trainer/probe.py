"""A short computation that shows how fast the machine's cores are now, and how fast a free one would be."""

from __future__ import annotations

import time
from typing import NamedTuple

import torch
from torch import Tensor

SMALL = 1 << 14  # elements, too few for PyTorch to share among threads
PARTS = 32  # as many small computations make a large one, which all threads share
SPAN = 0.1  # seconds of each measurement: many turns of the system's scheduler
SLOW = 4.0  # times as slow as on free cores


class Probe(NamedTuple):
    """Seconds for the same work."""

    free: float  # by one thread on a free core: from the fastest small part, which nothing interrupted
    one: float  # by one thread, now
    all: float  # by all threads, now

    def warning(self, threads: int) -> str | None:
        """Return a line that says that the cores are busy and what helps, or None if they are not.

        Args:
            threads: that `all` is for.
        """
        slower = self.all * threads / self.free
        if slower < SLOW:
            return None
        line = f"steps are slow, because other programs use the cores: {slower:.0f} times as slow as on free cores"
        if threads == 1:
            return line
        if self.one < self.all:
            return f"{line}; --threads 1 is faster now, {self.all / self.one:.1f} times in a short test"
        return f"{line}; try --threads {threads // 2}"


def probe() -> Probe:
    """Measure for a fifth of a second."""
    x = torch.linspace(-3, 3, SMALL * PARTS, device="cpu").view(PARTS, SMALL)
    out = torch.empty_like(x)
    torch.sin(x, out=out)  # the first call maps memory and wakes the threads
    parts = [part for row in range(PARTS) for part in timed(x[row], out[row], SPAN / PARTS)]
    whole = timed(x, out, SPAN)
    return Probe(PARTS * min(parts), PARTS * sum(parts) / len(parts), sum(whole) / len(whole))


def timed(x: Tensor, out: Tensor, span: float) -> list[float]:
    """Return the seconds of each of many computations, which take `span` seconds together."""
    found: list[float] = []
    begun = start = time.perf_counter()
    while start - begun < span:
        torch.sin(x, out=out)
        end = time.perf_counter()
        found.append(end - start)
        start = end
    return found
