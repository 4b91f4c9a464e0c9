"""The norm of each sample's gradient. The forward reads the gradient once; the backward reads and writes it once."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from math import inf
from typing import Any

import torch
from torch import Tensor

# From this number of elements, saving memory traffic pays for a Python Function (measured on a Xeon).
_LEAST = 2**16
_FULL = frozenset((torch.float32, torch.float64))
_LEAST_SQUARED = 2**17


def norms(grads: Sequence[Tensor], dims: tuple[int, ...] | None, *, squared: bool) -> Tensor:
    """Compute one norm over all gradients, in float32 or float64. Squares in half precision would overflow.

    Args:
        grads: each (N, *S), where S may differ.
        dims: the dimensions over which the norm is taken. None: all but the first.
        squared: whether to return squared norms.

    Returns:
        (N, *R), where R are the dimensions that are not in ``dims``.
    """
    take = _squared_norm if squared else _norm
    if len(grads) == 1:
        grad = grads[0]
        if not squared and dims is None and grad.ndim > 1 and grad.is_contiguous() and _is_small(grad, _LEAST):
            rows: Tensor = torch.linalg.vector_norm(grad.flatten(1), dim=1, dtype=_wide(grad.dtype))
            return rows  # faster than over several dimensions
        grad = _with_elements(grad)
        return take(grad, resolve(dims, grad.ndim), _wide(grad.dtype))
    dtype = dtype_of(grads)
    parts = [take(grad, resolve(dims, grad.ndim), dtype) for grad in map(_with_elements, grads)]
    if len({part.shape for part in parts}) > 1:
        shapes = ", ".join(str(tuple(part.shape)) for part in parts)
        raise ValueError(
            f"one norm over several inputs needs the same remaining dimensions for all, got dims={dims}, which leaves "
            f"{shapes}: leave dims out for one norm per sample"
        )
    stacked = torch.stack(parts)
    return stacked.sum(0) if squared else torch.linalg.vector_norm(stacked, dim=0)


def dtype_of(grads: Sequence[Tensor]) -> torch.dtype:
    """Return the dtype in which norms over these tensors are computed."""
    return reduce(torch.promote_types, (grad.dtype for grad in grads), torch.float32)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype.itemsize >= 4 else torch.float32


def remaining(shape: Sequence[int], dims: tuple[int, ...] | None) -> list[int]:
    """Return the shape of the norms over tensors of this shape."""
    over = resolve(dims, len(shape))
    return [size for dim, size in enumerate(shape) if dim not in over]


def resolve(dims: tuple[int, ...] | None, ndim: int) -> tuple[int, ...]:
    """Return ``dims`` as nonnegative indices for a tensor with ``ndim`` dimensions."""
    if dims is None:
        return tuple(range(1, ndim))
    resolved = tuple(dim + ndim if dim < 0 else dim for dim in dims)
    if any(not 0 < dim < ndim for dim in resolved) or len(set(resolved)) < len(resolved):
        raise ValueError(
            f"dims must name different dimensions of the inputs, none of them the first (the samples), got dims={dims} "
            f"for inputs of {ndim} dimensions"
        )
    return resolved


def _with_elements(grad: Tensor) -> Tensor:
    return grad if grad.ndim > 1 else grad[:, None]


def _norm(grad: Tensor, dims: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    if _is_small(grad, _LEAST):
        return _read_norm(grad, dims, dtype)
    norm: Tensor = _Norm.apply(grad, dims, dtype)  # type: ignore[no-untyped-call]
    return norm


def _squared_norm(grad: Tensor, dims: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    if _is_small(grad, _LEAST_SQUARED):
        wide = grad if grad.dtype is dtype else grad.to(dtype)
        return wide.square().sum(dims)
    squares: Tensor = _SquaredNorm.apply(grad, dims, dtype)  # type: ignore[no-untyped-call]
    return squares


def sum_of_squares(grads: Sequence[Tensor]) -> Tensor | None:
    """Return the sum of all squared norms in one step, or None if separate norms are not slower."""
    grad = grads[0]
    if len(grads) > 1 or not _is_small(grad, _LEAST_SQUARED):
        return None
    return total_of_squares(grad if grad.dtype.itemsize >= 4 else grad.float())


def total_of_squares(x: Tensor) -> Tensor:
    """Return the sum of the squares of all elements, with as few operations in its gradient as possible."""
    return torch.dot(x, x) if x.ndim == 1 and x.is_cpu else (x * x).sum()


def is_plain_and_small(grad: Tensor) -> bool:
    """Return whether the fewest calls give the penalty of a gradient (N, *S) on a CPU."""
    return (
        grad.is_cpu
        and grad.dtype in _FULL
        and grad.numel() < _LEAST
        and grad.ndim > 1
        and grad.is_contiguous()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_dynamo_compiling()
    )


def _is_small(grad: Tensor, least: int) -> bool:
    # Compilers fuse PyTorch's operations.
    return (grad.is_cpu and grad.numel() < least) or torch.compiler.is_dynamo_compiling()


def _read_norm(grad: Tensor, dims: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Compute the norm with one read of the gradient and without storing its squares."""
    norm: Tensor = torch.linalg.vector_norm(grad, dim=dims, dtype=dtype)
    return norm


def _spread(factor: Tensor, grad: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Reshape (N, *R) so that it broadcasts over ``grad``."""
    return factor.reshape([1 if dim in dims else size for dim, size in enumerate(grad.shape)])


class _Norm(torch.autograd.Function):
    """The norm, whose gradient at zero is zero. PyTorch's own function needs two more passes over the gradient."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, dims: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        norm = _read_norm(grad, dims, dtype)
        ctx.save_for_backward(grad, norm)
        ctx.dims = dims
        return norm

    @staticmethod
    def backward(ctx: Any, by: Tensor) -> tuple[Tensor, None, None]:
        grad, norm = ctx.saved_tensors
        factor = by / norm.masked_fill(norm == 0, inf)  # (N, *R); 0 at 0, as are all its derivatives
        return (grad * _spread(factor, grad, ctx.dims)).to(grad.dtype), None, None


class _SquaredNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, grad: Tensor, dims: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(grad)
        ctx.dims = dims
        return _read_norm(grad, dims, dtype).square()

    @staticmethod
    def backward(ctx: Any, by: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = ctx.saved_tensors
        return (grad * _spread(2 * by, grad, ctx.dims)).to(grad.dtype), None, None
