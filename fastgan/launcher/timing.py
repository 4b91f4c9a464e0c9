"""Steps with a penalty, timed with PyTorch's derivatives and with fastgan's, of which the faster stays.

A step begins with the first penalized forward and ends with the last backward before the optimizer steps. The first one
is PyTorch's own: its gradients and its work are noted. The second one warms fastgan up. Then both take turns.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from enum import Enum, auto
from statistics import fmean
from time import perf_counter
from typing import Any
from weakref import ref

import torch
from torch import nn

from fastgan.launcher.gradients import Pattern
from fastgan.launcher.sites import Site
from fastgan.launcher.work import Count, is_counting_possible

PAIRS = 8
LEAST_GAIN = 1.02  # below it, timings of equal steps could decide


def usual(times: list[float]) -> float:
    """The mean of the faster half: what interrupts a step makes it slower, never faster."""
    return fmean(sorted(times)[: (len(times) + 1) // 2])


class Way(Enum):
    """How the steps after the first one are taken."""

    FASTER = auto()
    FASTGAN = auto()
    PYTORCH = auto()
    TURNS = auto()


class Unit:
    """What is known of the steps that begin with one penalized call."""

    def __init__(self, module: nn.Module, site: Site, place: str, way: Way) -> None:
        self.module, self.site, self.place = ref(module), site, place
        self.name = type(module).__name__
        self.way = way
        self.steps = 0
        self.within = ""  # where the steps begin that have its calls
        self.times: dict[bool, list[float]] = {False: [], True: []}  # by whether it was fastgan's
        self.work: dict[bool, int] = {}
        self.forward_work = 0
        self.pattern = Pattern()
        self.choice: bool | None = None

    def begin(self) -> Step:
        number = self.steps
        self.steps += 1
        if self.way is Way.PYTORCH:
            return Step(self, False, timed=True)
        if number < 2:
            return Step(self, number == 1, count=Count() if is_counting_possible() else None)
        if self.way is Way.TURNS:
            return Step(self, number % 2 == 1, timed=True)
        if self.way is Way.FASTGAN:
            return Step(self, True, timed=True)
        if self.choice is not None:
            return Step(self, self.choice)
        # plain, lean, lean, plain: a drift of the machine's speed is shared by both
        return Step(self, (number // 2) % 2 == number % 2, timed=True)

    def is_next_lean(self) -> bool:
        return self.steps % 2 == 1

    def end(self, step: Step) -> None:
        if step.count is not None:
            self.work[step.is_lean] = step.count.total
            self.forward_work = max(self.forward_work, step.forward_work)
        if step.timed and step.last is not None:
            times = self.times[step.is_lean]
            times.append(step.last - step.first)
            del times[:-1000]
        if self.choice is None and self.way is Way.FASTER:
            plain, lean = self.times[False], self.times[True]
            if len(plain) >= PAIRS and len(lean) >= PAIRS:
                self.choice = usual(plain) > LEAST_GAIN * usual(lean)

    def time(self, is_lean: bool) -> float | None:
        return usual(self.times[is_lean]) if self.times[is_lean] else None


@dataclass
class Step:
    """One step of one thread."""

    unit: Unit
    is_lean: bool
    timed: bool = False
    count: Count | None = None
    units: set[int] = field(default_factory=set)  # ids of those whose calls it has
    rerouted: bool = False
    forward_work: int = 0
    first: float = 0.0
    last: float | None = None
    ended: bool = False

    def start(self) -> None:
        self.first = self._now()

    def lap(self) -> None:
        if not self.ended:
            self.last = self._now()

    def end(self) -> None:
        if not self.ended:
            self.ended = True
            self.unit.end(self)

    def _now(self) -> float:
        if self.timed and torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return perf_counter()

    def counting(self) -> Any:
        return self.count if self.count is not None and not self.ended else nullcontext()
