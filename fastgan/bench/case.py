"""One computation to be timed, in several variants that must agree."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.linalg import vector_norm

from fastgan import backends

Run = Callable[[], Sequence[Tensor]]
Make = Callable[[], Run]

BASELINE = "torch"
OPTIONAL = ("torch.compile",)  # takes minutes to compile, and may fail: timed when asked for
COUNTS = ("flops", "peak", "saved")
BY_NAME = ("triton", "cuda")  # backends that compete on a GPU, where each is a variant


class TooLarge(Exception):
    """A variant that this device has no memory for."""


@dataclass(frozen=True)
class Growth:
    """A point of a line along which one size grows, with the exponents that theory gives the variants' cost.

    Cost is proportional to ``size ** exponent``; ``peak`` is of the memory, ``time`` of the seconds. A variant that is
    not named has OTHERS' exponent.
    """

    line: str
    size: str  # its name, a key of the case's sizes
    time: Mapping[str, float]
    peak: Mapping[str, float]


OTHERS = "others"


@dataclass(frozen=True)
class Case:
    """One computation in several variants, on equal inputs and from equal states.

    ``bytes`` and ``operations`` are the floor: what any implementation has to move through memory (each input read
    once, each result written once) and to compute. ``setup`` makes the variants, BASELINE first; each keeps its own
    state, so that after the same number of calls all give the same.
    """

    name: str
    op: str | None  # as registered with backends; None for a computation of several ops
    dtype: torch.dtype
    device_types: tuple[str, ...]
    bytes: int | None
    operations: int | None
    tolerance: float  # of a variant's error relative to BASELINE's result: twice what the tests allow either
    setup: Callable[[torch.device, torch.dtype], dict[str, Make]]
    suite: str = "ops"
    counted: tuple[str, ...] = ()  # of COUNTS: what one call computes, holds, and keeps for backward
    family: str = ""  # cases of one family differ in their sizes alone
    sizes: Mapping[str, int] = field(default_factory=dict)
    growth: Growth | None = None
    negligible: float = 1e-6  # a norm beside the largest tensor's: what is smaller is rounding
    about: Callable[[torch.device, torch.dtype], dict[str, Any]] | None = None  # what else the record says of it


def on_backend(backend: str, run: Run) -> Run:
    def forced() -> Sequence[Tensor]:
        with backends.use_backend(backend):
            return run()

    return forced


def prepare(
    case: Case, device: torch.device, *, optional: bool = False, failed: dict[str, str] | None = None
) -> tuple[dict[str, Run], dict[str, float], dict[str, str]]:
    """The variants of a case, their errors relative to BASELINE, and why others are left out.

    ``failed``: takes the reasons of variants that raise or are wrong, which are left out; else that is an error.

    Raises:
        ArithmeticError: a variant's result is not BASELINE's, or that is not finite. Nothing wrong is timed.
    """
    variants: dict[str, Run] = {}
    against = BASELINE
    errors: dict[str, float] = {}
    left_out: dict[str, str] = {}
    expected: Sequence[Tensor] = ()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for name, make in case.setup(device, case.dtype).items():
            if name in OPTIONAL and not optional:
                continue
            try:
                run = make()
                run()
                result = run()  # the second depends on the state that the first left behind
            except (TooLarge, torch.OutOfMemoryError) as error:
                left_out[name] = str(error).partition("\n")[0]
                continue
            except Exception as error:
                if name not in OPTIONAL and (failed is None or name == BASELINE):
                    raise
                left_out[name] = f"{type(error).__name__}: {error}".partition("\n")[0]
                if failed is not None and name not in OPTIONAL:
                    failed[name] = left_out[name]
                continue
            if not expected:
                expected, against = result, name
            variants[name], errors[name] = run, _error(result, expected, case.negligible)
            if name == against and math.isnan(errors[name]):
                raise FloatingPointError(f"{case.name}: {name} gives numbers that are not finite")
            if not errors[name] <= case.tolerance:  # NaN is wrong too
                wrong = (
                    f"{case.name}: {name} differs from {against} by {errors[name]:.1e}, tolerance {case.tolerance:.0e}"
                )
                if failed is None:
                    raise ArithmeticError(wrong)
                left_out[name] = failed[name] = wrong
                del variants[name], errors[name]
    for backend in BY_NAME:
        if case.suite == "ops" and case.op and device.type == "cuda" and backend not in variants:
            left_out.setdefault(backend, backends.why_not(case.op, backend, device.type, case.dtype) or "not declared")
    return variants, errors, left_out


@torch.no_grad()
def _error(result: Sequence[Tensor], expected: Sequence[Tensor], negligible: float) -> float:
    """The largest error of a tensor, relative to its norm unless that is negligible; NaN if there is one."""
    norms = torch.stack([vector_norm(wanted, dtype=torch.float64) for wanted in expected])
    errors = [
        vector_norm(actual - wanted, dtype=torch.float64) for actual, wanted in zip(result, expected, strict=True)
    ]
    return float((torch.stack(errors) / norms.clamp(min=negligible * norms.max())).max())
