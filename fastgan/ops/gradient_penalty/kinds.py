"""The kinds of penalty: functions of the norms of the gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgan.ops.gradient_penalty.norms import (
    dtype_of,
    is_plain_and_small,
    norms,
    remaining,
    sum_of_squares,
    total_of_squares,
)
from fastgan.ops.library import is_autocast

Kind = str | Callable[[Tensor], Tensor]
Number = float | Tensor
Dims = int | Sequence[int]


class _Formula(NamedTuple):
    """The penalty of each sample as a function of its norm or squared norm (N,) and a target."""

    of: Callable[[Tensor, Any], Tensor]
    is_root: bool = False  # ``of`` returns the square root of the penalty
    target: float | None = None  # None: the formula has no target
    squared: bool = False
    factor: float = 1.0
    largest: bool = False  # return the largest penalty instead of the mean


_TWO_SIDED = _Formula(lambda norms, target: norms - target, is_root=True, target=1.0)
_ONE_SIDED = _Formula(lambda norms, target: (norms - target).clamp(min=0), is_root=True, target=1.0)
_SQUARED = _Formula(lambda squares, _: squares, squared=True)

KINDS = {
    "wgan-gp": _TWO_SIDED,
    "wgan-lp": _ONE_SIDED,
    "max-gp": _SQUARED._replace(largest=True),
    "zero-centered": _SQUARED,
    "dragan": _TWO_SIDED,
    "r1": _SQUARED._replace(factor=0.5),
    "r2": _SQUARED._replace(factor=0.5),
    "r1+r2": _SQUARED._replace(factor=0.5),
    "r1-finite-difference": _SQUARED._replace(factor=0.5),
}
_REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {"mean": Tensor.mean, "sum": Tensor.sum, "none": lambda each: each}


@dataclass(frozen=True, slots=True, eq=False)  # Dynamo of torch 2.11 hashes it before it has its fields
class Penalty:
    """A function of the gradients at the points. ``gradient_penalty`` describes the fields."""

    kind: Kind = "r1"
    weight: Number | None = None
    target: Number | None = None
    dims: Dims | None = None
    reduction: str = "mean"
    _over: tuple[int, ...] | None = field(init=False, default=None)  # dims as a tuple
    _formula: _Formula = field(init=False, repr=False, compare=False, default=_SQUARED)
    is_approximate: bool = field(init=False, repr=False, compare=False, default=False)  # uses finite differences
    _sums_all: bool = field(
        init=False, repr=False, compare=False, default=False
    )  # the penalty is a plain sum of squares

    _of_small: Callable[[Penalty, Tensor], Tensor] | None = field(init=False, repr=False, compare=False, default=None)

    def __post_init__(self) -> None:
        check_kind(self.kind)
        _check_number("weight", self.weight)
        _check_number("target", self.target)
        if isinstance(self.weight, Tensor) and self.weight.ndim:
            raise ValueError(f"weight must be a number or a tensor of shape (), got shape {tuple(self.weight.shape)}")
        if not isinstance(self.reduction, str) or self.reduction not in _REDUCTIONS:
            raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {self.reduction!r}")
        object.__setattr__(self, "is_approximate", self.kind == "r1-finite-difference")
        if self.is_approximate and self.reduction == "none":
            raise ValueError(f"{self._name} needs reduction 'mean' or 'sum', got {self.reduction!r}")
        formula = KINDS[self.kind] if isinstance(self.kind, str) else _Formula(_checked(self.kind))
        object.__setattr__(self, "_over", _checked_dims(self.dims))
        object.__setattr__(self, "_formula", formula)
        sums = formula.squared and not formula.largest and self.reduction != "none"
        object.__setattr__(self, "_sums_all", sums and self._over is None)
        if self.target is not None and self._formula.target is None:
            raise ValueError(
                f"{self._name} has no target, got target={self.target}: only wgan-gp, wgan-lp and dragan take one"
            )
        if self._formula.largest and self.reduction != "mean":
            raise ValueError(
                f"{self._name} returns the largest penalty in the batch: leave reduction out, got {self.reduction!r}"
            )

        if formula is _TWO_SIDED or self._sums_all:
            plain = self._over is None and self.reduction != "none"
            if plain and not isinstance(self.weight, Tensor) and not isinstance(self.target, Tensor):
                object.__setattr__(self, "_of_small", Penalty._squares if self._sums_all else Penalty._two_sided)

    def check_compilable(self) -> None:
        """Raise if torch.compile cannot trace this penalty."""
        if self.is_approximate:
            raise ValueError(
                f"{self._name} cannot be compiled: use kind 'r1' inside torch.compile, or call the penalty in a "
                "function decorated with torch.compiler.disable"
            )

    @property
    def _name(self) -> str:
        return f"kind {self.kind!r}" if isinstance(self.kind, str) else "a kind that is a function"

    def __call__(self, grads: Sequence[Tensor]) -> Tensor:
        """Return the penalty of the gradients, each (N, *S)."""
        if self._of_small is not None and len(grads) == 1 and is_plain_and_small(grads[0]):
            return self._of_small(self, grads[0])
        if is_autocast(grads[0].device.type):
            with torch.autocast(grads[0].device.type, enabled=False):
                return self._of(grads)
        return self._of(grads)

    # The next two equal _of in few calls, which a small model notices.

    def _squares(self, grad: Tensor) -> Tensor:
        factor = self._formula.factor / (grad.shape[0] if self.reduction == "mean" else 1)
        penalty: Tensor = (grad * grad).sum() * ((10.0 if self.weight is None else self.weight) * factor)
        return penalty

    def _two_sided(self, grad: Tensor) -> Tensor:
        factor = self._formula.factor / (grad.shape[0] if self.reduction == "mean" else 1)
        each = torch.linalg.vector_norm(grad.flatten(1), dim=1) - (1.0 if self.target is None else self.target)
        penalty: Tensor = torch.dot(each, each) * ((10.0 if self.weight is None else self.weight) * factor)
        return penalty

    def _of(self, grads: Sequence[Tensor]) -> Tensor:
        if self._sums_all and (total := sum_of_squares(grads)) is not None:
            return self._weighted(total, grads[0].shape[0] if self.reduction == "mean" else 1)
        formula = self._formula
        target = formula.target if self.target is None else self.target
        size = norms(grads, self._over, squared=formula.squared)  # (N, *R)
        each = formula.of(size, _broadcasting(target, size) if isinstance(target, Tensor) else target)
        if formula.is_root:
            if self.reduction != "none":
                return self._weighted(total_of_squares(each), each.numel() if self.reduction == "mean" else 1)
            each = each.square()
        return self._weighted(each.max() if formula.largest else _REDUCTIONS[self.reduction](each))

    def _weighted(self, penalty: Tensor, count: int = 1) -> Tensor:
        factor = self._formula.factor / count
        if isinstance(self.weight, Tensor):
            return self.weight.to(penalty.dtype) * (factor * penalty)
        return penalty * ((10.0 if self.weight is None else self.weight) * factor)

    def zero(self, inputs: Sequence[Tensor]) -> Tensor:
        """Return a zero with the shape and dtype of a penalty at these inputs.

        It requires a gradient, so that ``backward`` may be called on it. While torch.compile traces, it is a constant.
        """
        shape = remaining(inputs[0].shape, self._over) if self.reduction == "none" else []
        zero = torch.zeros(shape, dtype=dtype_of(inputs), device=inputs[0].device)
        return zero if torch.compiler.is_dynamo_compiling() else zero.requires_grad_()


def penalty_of(kind: Kind, weight: Number | None, target: Number | None, dims: Dims | None, reduction: str) -> Penalty:
    """Return a Penalty. Common combinations of arguments are checked once and cached."""
    common = target is None and dims is None and type(weight) in _COMMON and type(kind) is str
    if common and type(reduction) is str and not torch.compiler.is_dynamo_compiling():
        return _common(kind, weight, reduction)
    return Penalty(kind, weight, target, dims, reduction)


_COMMON = (float, int, type(None))


@lru_cache(64, typed=True)
def _common(kind: str, weight: Number | None, reduction: str) -> Penalty:
    return Penalty(kind, weight, reduction=reduction)


def penalize(kind: Kind, grad: Tensor, weight: Number) -> Tensor:
    """Return the penalty of one gradient (N, *S), in float32 or float64."""
    return Penalty(kind, weight)((grad,))


def check_kind(kind: Any) -> None:
    if not callable(kind) and not (isinstance(kind, str) and kind in KINDS):
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, or a function of the norms, got {kind!r}")


def _check_number(name: str, value: Any) -> None:
    real = isinstance(value, Tensor) and not value.is_complex()
    if not (value is None or real or isinstance(value, Real)):
        raise TypeError(f"{name} must be a number or a tensor of real numbers, got {value!r}")


def _checked_dims(dims: Any) -> tuple[int, ...] | None:
    if dims is None:
        return None
    each = (dims,) if isinstance(dims, int) else dims
    if not isinstance(each, Sequence) or any(not isinstance(dim, int) or isinstance(dim, bool) for dim in each):
        raise TypeError(f"dims must be an integer or a tuple of integers, got {dims!r}")
    if not each or 0 in each:
        raise ValueError(f"dims must name dimensions of the inputs other than the first (the samples), got {dims!r}")
    return tuple(each)


def _checked(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Any], Tensor]:
    def call(norms: Tensor, _: None) -> Tensor:
        each = function(norms)
        if not isinstance(each, Tensor):
            raise TypeError(f"kind must return a tensor of penalties, got {type(each).__name__}")
        if each.shape != norms.shape:
            raise ValueError(
                f"kind must return one penalty per norm, of shape {tuple(norms.shape)}, got {tuple(each.shape)}: "
                "reduction= takes the mean or the sum"
            )
        return each

    return call


def _broadcasting(target: Tensor, norms: Tensor) -> Tensor:
    fits = target.ndim <= norms.ndim and all(
        size in (1, of_norms) for size, of_norms in zip(reversed(target.shape), reversed(norms.shape), strict=False)
    )
    if not fits:
        raise ValueError(f"target must broadcast to the norms, {tuple(norms.shape)}, got shape {tuple(target.shape)}")
    return target.to(norms.dtype)
