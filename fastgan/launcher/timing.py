"""Time steps with a penalized call in PyTorch and with fastgan, and choose the faster one.

A step begins with the first penalized forward and ends with the last backward before the optimizer's step. PyTorch's
functions run up to the first step with a penalty, whose gradients and work are recorded. Then fastgan warms up in one
such step. After that, both take turns until a trial has enough times of each.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from enum import Enum, auto
from random import Random
from statistics import fmean
from time import perf_counter
from typing import Any
from weakref import ref

import torch
from torch import nn
from torch.autograd.graph import Node

from fastgan.launcher.gradients import Pattern
from fastgan.launcher.sites import Site
from fastgan.launcher.work import Count, is_counting_possible
from fastgan.ops.gradient_penalty.zeros import reached

PAIRS = 8
LEAST_GAIN = 1.02  # a smaller gain may be noise
LONGEST_TRIAL = 1000  # steps, for a script that rarely computes the penalty
AGAIN = 50  # lengths of a trial from its end to the next one
AGAIN_AT_ANOTHER_SIZE = 20
MOST_PATTERNS = 64  # of zeros and None, for a script with ever new sizes
PATIENCE = 64  # steps in which to wait for the first penalty


def typical(times: list[float]) -> float:
    """Return the mean of the faster half. Interruptions only make steps slower."""
    return fmean(sorted(times)[: (len(times) + 1) // 2])


def is_fused_in_turn(number: int) -> bool:
    """Return whether fastgan computes this step of an alternation.

    Each pair of steps has one of both, in an irregular order: scripts that do something else in every 2nd or 16th step,
    such as lazy regularization, do it in steps of both.
    """
    return (number % 2 == 1) != (Random(number // 2).random() < 0.5)


Kind = tuple[bool, int]


class Way(Enum):
    """Who computes the steps after the first one."""

    FASTER = auto()
    FASTGAN = auto()
    PYTORCH = auto()
    TURNS = auto()


class Trial:
    """The times of steps by PyTorch and by fastgan.

    Steps of different kinds are kept apart: with and without a penalty, and with other numbers of penalized calls.
    """

    def __init__(self, size: object = None) -> None:
        self.size = size
        self.steps = 0
        self.shown: set[bool] = set()  # the ways that had a step with a penalty
        self._times: dict[Kind, dict[bool, list[float]]] = {}  # key: whether fastgan computed the step

    def add(self, step: Step, time: float) -> None:
        times = self._times.setdefault(step.kind(), {False: [], True: []})[step.is_fused]
        times.append(time)
        del times[:-1000]

    def time(self, is_fused: bool) -> float | None:
        """Return the time of a step: the typical times of each kind, in their proportion."""
        found = [times for times in self._times.values() if all(times.values())] or [*self._times.values()]
        found = [times for times in found if times[is_fused]]
        counts = [len(times[False]) + len(times[True]) for times in found]
        total = sum(count * typical(times[is_fused]) for count, times in zip(counts, found, strict=True))
        return total / sum(counts) if counts else None

    def is_complete(self) -> bool:
        """Return whether each kind with a penalty that is not an exception has enough times of both."""
        penalized = [times for kind, times in self._times.items() if kind[0]]
        most = max((len(times[False]) + len(times[True]) for times in penalized), default=0)
        usual = [times for times in penalized if len(times[False]) + len(times[True]) >= most / 32]
        return self.steps >= LONGEST_TRIAL or (
            most > 0 and all(len(times[way]) >= PAIRS for times in usual for way in (False, True))
        )

    def is_fastgan_faster(self) -> bool:
        plain, fused = self.time(False), self.time(True)
        return plain is not None and fused is not None and plain > LEAST_GAIN * fused


class Unit:
    """The times and the work of the steps that begin with one penalized call."""

    def __init__(self, module: nn.Module, site: Site, place: str, way: Way) -> None:
        self.module, self.site, self.place = ref(module), site, place
        self.name = type(module).__name__
        self.way = way
        self.steps = 0
        self.penalties = 0  # steps with a penalty
        self.within = ""  # the place where the steps that contain its calls begin
        self.work: dict[bool, int] = {}  # key: whether fastgan computed the step
        self.forward_work = 0
        self.pattern: dict[tuple[Kind, object], Pattern] = {}  # key: kind of step, and size
        self.choice: bool | None = None  # None during a trial
        self.kept: bool | None = None  # the last choice
        self._trial = Trial()
        self._decided: Trial | None = None
        self._since = 0  # steps since the decision

    def begin(self, size: object = None) -> Step:
        """Begin a step.

        Args:
            size: the shape of a sample, and other arguments. If it changes, as in progressive growing, there is
                another trial soon.
        """
        self.steps += 1
        if self.way is Way.PYTORCH:
            return Step(self, False, timed=True)
        if self._is_time_to_try_again(size):
            self._trial, self.choice = Trial(size), None
            self.pattern.clear()
        is_fused = self.is_next_fused()
        is_shown = len(self._trial.shown) == 2
        if self.choice is None:
            self._trial.size = size if self._trial.steps == 0 else self._trial.size
            self._trial.steps += 1
        if is_fused not in self.work and self.steps <= PATIENCE and is_counting_possible():
            return Step(self, is_fused, count=Count())
        return Step(self, is_fused, timed=is_shown and self.choice is None)

    def is_next_fused(self) -> bool:
        if self.choice is not None:
            return self.choice
        trial = self._trial
        if len(trial.shown) < 2 and trial.steps < PATIENCE:
            return False in trial.shown
        return self.way is Way.FASTGAN or is_fused_in_turn(trial.steps)

    def _is_time_to_try_again(self, size: object) -> bool:
        if self.choice is None:
            return False
        self._since += 1
        return self._since > (AGAIN if size == self._trial.size else AGAIN_AT_ANOTHER_SIZE) * self._trial.steps

    def end(self, step: Step) -> None:
        if step.last is None:  # it had no backward
            return
        if step.penalized:
            self.penalties += 1
            self._trial.shown.add(step.is_fused)
        if step.count is not None and step.penalized:
            self.work[step.is_fused] = step.count.total
            self.forward_work = max(self.forward_work, step.forward_work)
        if step.timed:
            self._trial.add(step, step.last - step.first)
        if self.choice is None and self.way is Way.FASTER and self._trial.is_complete():
            self.choice = self.kept = self._trial.is_fastgan_faster()
            self._decided, self._since = self._trial, 0

    def time(self, is_fused: bool) -> float | None:
        return (self._decided or self._trial).time(is_fused)


@dataclass
class Step:
    """One step of one thread."""

    unit: Unit
    is_fused: bool
    timed: bool = False
    count: Count | None = None
    size: object = None
    units: set[int] = field(default_factory=set)  # ids of the units whose calls it contains
    optimizers: set[int] = field(default_factory=set)  # ids of those that took its gradients
    ends: list[Node] = field(default_factory=list)  # of the forwards that were penalized
    used: set[int] = field(default_factory=set)  # ids of the leaves of these forwards
    penalized: bool = False  # whether it had a gradient with create_graph=True
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

    def find_used(self) -> None:
        """Find the leaves, and release the graph."""
        if self.ends:
            self.used |= {id(node.variable) for node in reached(self.ends) if hasattr(node, "variable")}
            self.ends = []

    def kind(self) -> Kind:
        return self.penalized, len(self.units)

    def pattern(self) -> Pattern:
        found = self.unit.pattern
        if len(found) >= MOST_PATTERNS:
            found.clear()
        return found.setdefault((self.kind(), self.size), Pattern())

    def _now(self) -> float:
        if self.timed and torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return perf_counter()

    def counting(self) -> Any:
        count = self.count
        return nullcontext() if count is None or count.is_on or self.ended else count
