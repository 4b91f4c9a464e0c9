"""A computation to time, in several variants that must agree."""

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
# Timed only on request: these take minutes to compile, and may fail.
OPTIONAL = (
    "torch.compile",
    "torch.compile, eager penalty",
    "torch.compile, backward inside",
    "fastgan, compiled",
    "fastgan, compiled, backward inside",
)
COUNTS = ("flops", "peak", "saved")
BY_NAME = ("triton", "cuda")  # backends that compete on a GPU; each is a variant there


class TooLarge(Exception):
    """The device has too little memory for a variant."""


@dataclass(frozen=True)
class Growth:
    """One point of a series in which one size grows, with the theoretical exponents of each variant's cost.

    Cost is proportional to ``size ** exponent``. ``time`` has the exponents of the run time, ``peak`` those of the
    memory. A variant that is not listed uses the exponent of OTHERS.
    """

    line: str
    size: str  # name of the growing size, a key of the case's sizes
    time: Mapping[str, float]
    peak: Mapping[str, float]


OTHERS = "others"


@dataclass(frozen=True)
class Case:
    """One computation in several variants, with equal inputs and equal initial states.

    ``bytes`` and ``operations`` are lower bounds: what any implementation must move through memory (it reads each input
    once and writes each result once) and compute. ``setup`` builds the variants, BASELINE first. Each variant keeps its
    own state, so that after the same number of calls all return the same result.
    """

    name: str
    op: str | None  # name registered with backends; None if the computation uses several ops
    dtype: torch.dtype
    device_types: tuple[str, ...]
    bytes: int | None
    operations: int | None
    tolerance: float  # of a variant's error relative to BASELINE's result: twice the tests' tolerance for each
    setup: Callable[[torch.device, torch.dtype], dict[str, Make]]
    suite: str = "ops"
    counted: tuple[str, ...] = ()  # counts to take (of COUNTS): operations, peak memory, memory saved for backward
    family: str = ""  # cases of one family differ only in their sizes
    sizes: Mapping[str, int] = field(default_factory=dict)
    growth: Growth | None = None
    negligible: float = 1e-6  # norms smaller than this, relative to the largest tensor's norm, count as rounding
    about: Callable[[torch.device, torch.dtype], dict[str, Any]] | None = None  # further entries of the record


def on_backend(backend: str, run: Run) -> Run:
    def forced() -> Sequence[Tensor]:
        with backends.use_backend(backend):
            return run()

    return forced


def prepare(
    case: Case, device: torch.device, *, optional: bool = False, failed: dict[str, str] | None = None
) -> tuple[dict[str, Run], dict[str, float], dict[str, str]]:
    """Return the variants of a case, their errors relative to BASELINE, and the reasons why others are left out.

    If ``failed`` is given, variants that raise or are wrong are left out and it receives the reasons. Otherwise that is
    an error.

    Raises:
        ArithmeticError: a variant's result differs from BASELINE's, or BASELINE's is not finite. Wrong results are
            never timed.
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
                result = run()  # compare the second call, which depends on the state that the first left
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
                raise FloatingPointError(f"{case.name}: {name} returns values that are not finite")
            if not errors[name] <= case.tolerance:  # also true for NaN
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
    """Return the largest error of any tensor, relative to its norm unless that is negligible. NaN propagates."""
    norms = torch.stack([vector_norm(wanted, dtype=torch.float64) for wanted in expected])
    errors = [
        vector_norm(actual - wanted, dtype=torch.float64) for actual, wanted in zip(result, expected, strict=True)
    ]
    return float((torch.stack(errors) / norms.clamp(min=negligible * norms.max())).max())
