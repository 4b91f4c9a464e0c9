"""Time steps with a penalty in PyTorch and with fastgan, and choose the faster one.

A step begins with the first penalized forward and ends with the last backward before the optimizer's step. The first
step runs PyTorch's functions, and its gradients and work are recorded. The second step is a warm-up of fastgan. After
that, both take turns.
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
LEAST_GAIN = 1.02  # a smaller gain may be noise


def typical(times: list[float]) -> float:
    """Return the mean of the faster half. Interruptions only make steps slower."""
    return fmean(sorted(times)[: (len(times) + 1) // 2])


class Way(Enum):
    """Who computes the steps after the first one."""

    FASTER = auto()
    FASTGAN = auto()
    PYTORCH = auto()
    TURNS = auto()


class Unit:
    """The times and the work of the steps that begin with one penalized call."""

    def __init__(self, module: nn.Module, site: Site, place: str, way: Way) -> None:
        self.module, self.site, self.place = ref(module), site, place
        self.name = type(module).__name__
        self.way = way
        self.steps = 0
        self.within = ""  # the place where the steps that contain its calls begin
        self.times: dict[bool, list[float]] = {False: [], True: []}  # key: whether fastgan computed the step
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
        # plain, fused, fused, plain: a drift of the machine's speed affects both alike
        return Step(self, (number // 2) % 2 == number % 2, timed=True)

    def is_next_fused(self) -> bool:
        return self.steps % 2 == 1

    def end(self, step: Step) -> None:
        if step.count is not None and step.last is not None:  # it had a backward
            self.work[step.is_fused] = step.count.total
            self.forward_work = max(self.forward_work, step.forward_work)
        if step.timed and step.last is not None:
            times = self.times[step.is_fused]
            times.append(step.last - step.first)
            del times[:-1000]
        if self.choice is None and self.way is Way.FASTER:
            plain, fused = self.times[False], self.times[True]
            if len(plain) >= PAIRS and len(fused) >= PAIRS:
                self.choice = typical(plain) > LEAST_GAIN * typical(fused)

    def time(self, is_fused: bool) -> float | None:
        return typical(self.times[is_fused]) if self.times[is_fused] else None


@dataclass
class Step:
    """One step of one thread."""

    unit: Unit
    is_fused: bool
    timed: bool = False
    count: Count | None = None
    units: set[int] = field(default_factory=set)  # ids of the units whose calls it contains
    optimizers: set[int] = field(default_factory=set)  # ids of those that took its gradients
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
