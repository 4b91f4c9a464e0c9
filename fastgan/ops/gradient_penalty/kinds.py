"""The kinds of penalty: at which points the gradient is taken, and what is made of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import inf
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from fastgan.ops.library import without_autocast

_LEAST = 2**14  # elements, from which reading them less often is worth a Python function


def _two_sided(grad: Tensor) -> Tensor:
    return (_norm(grad) - 1).square().mean()


def _one_sided(grad: Tensor) -> Tensor:
    return (_norm(grad) - 1).clamp(min=0).square().mean()


def _squared(grad: Tensor) -> Tensor:
    return _squared_norm(grad).mean()


def _half_squared(grad: Tensor) -> Tensor:
    return _squared(grad) / 2


def _largest(grad: Tensor) -> Tensor:
    return _squared_norm(grad).max()


def _norm(grad: Tensor) -> Tensor:
    norm: Tensor = _read_norm(grad) if _is_small(grad) else _Norm.apply(grad)  # type: ignore[no-untyped-call]
    return norm


def _squared_norm(grad: Tensor) -> Tensor:
    if _is_small(grad):
        return grad.to(_at_least_float32(grad)).square().sum(1)
    squares: Tensor = _SquaredNorm.apply(grad)  # type: ignore[no-untyped-call]
    return squares


def _is_small(grad: Tensor) -> bool:
    return grad.is_cpu and grad.numel() < _LEAST


def _read_norm(grad: Tensor) -> Tensor:
    """(N,): reads the gradient once and makes no squares of it."""
    norm: Tensor = torch.linalg.vector_norm(grad, dim=1, dtype=_at_least_float32(grad))
    return norm


def _at_least_float32(grad: Tensor) -> torch.dtype:
    return torch.promote_types(grad.dtype, torch.float32)


class _Norm(torch.autograd.Function):
    """(N, M) -> (N,): one read, and one read and one write back, zero at zero; PyTorch goes over it twice more."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor) -> Tensor:
        norm = _read_norm(grad)
        ctx.save_for_backward(grad, norm)
        return norm

    @staticmethod
    def backward(ctx: Any, by: Tensor) -> Tensor:
        grad, norm = ctx.saved_tensors
        factor = by / norm.masked_fill(norm == 0, inf)  # (N,); 0 at 0, as are all its derivatives
        return (grad * factor[:, None]).to(grad.dtype)  # type: ignore[no-any-return]


class _SquaredNorm(torch.autograd.Function):
    """(N, M) -> (N,): likewise, with no zero to mind."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor) -> Tensor:
        ctx.save_for_backward(grad)
        return _read_norm(grad).square()

    @staticmethod
    def backward(ctx: Any, by: Tensor) -> Tensor:
        (grad,) = ctx.saved_tensors
        return (grad * (2 * by)[:, None]).to(grad.dtype)  # type: ignore[no-any-return]


KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "wgan-gp": _two_sided,
    "wgan-lp": _one_sided,
    "max-gp": _largest,
    "zero-centered": _squared,
    "dragan": _two_sided,
    "r1": _half_squared,
    "r2": _half_squared,
    "r1+r2": _half_squared,
}


def check_kind(kind: str) -> None:
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")


def check_weight(weight: Any) -> None:
    if not (weight is None or isinstance(weight, Real) or (isinstance(weight, Tensor) and weight.ndim == 0)):
        raise TypeError(f"weight must be a number, got {weight!r}")


def penalise(kind: str, grad: Tensor, weight: float) -> Tensor:
    """weight * penalty of the gradients (N, *S), in float32 or better: a half-precision square would overflow."""
    with without_autocast(grad.device.type):
        flat = grad.flatten(1) if grad.ndim > 1 else grad[:, None]  # (N, prod S)
        return weight * KINDS[kind](flat)


def points(kind: str, real: Tensor, fake: Tensor | None, generator: torch.Generator | None) -> Iterator[Tensor]:
    """The points (N, *S) at which the gradient is taken: one tensor, or two for "r1+r2"."""
    check_input("real", real)
    if kind == "r1":
        yield real
    elif kind == "dragan":
        noise = torch.rand(real.shape, dtype=real.dtype, device=real.device, generator=generator)
        yield real.detach() + _alpha(real, generator) * 0.5 * real.detach().std() * noise
    else:
        if fake is None:
            raise TypeError(f"kind {kind!r} needs fake, got None")
        check_input("fake", fake)
        if fake.shape != real.shape:
            raise ValueError(f"fake must have the shape of real, {tuple(real.shape)}, got {tuple(fake.shape)}")
        if fake.device != real.device:
            raise ValueError(f"fake must be on the device of real, {real.device}, got {fake.device}")
        if kind == "r1+r2":
            yield real
            yield fake
        elif kind == "r2":
            yield fake
        else:
            yield torch.lerp(fake.detach().to(real.dtype), real.detach(), _alpha(real, generator))


def _alpha(real: Tensor, generator: torch.Generator | None) -> Tensor:
    shape = real.shape[0], *[1] * (real.ndim - 1)
    return torch.rand(shape, dtype=real.dtype, device=real.device, generator=generator)


def check_input(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"{name} must be floating, got {x.dtype}")
    if x.ndim == 0 or x.numel() == 0:
        raise ValueError(f"{name} must be (N, ...) and not empty, got shape {tuple(x.shape)}")
