"""One autograd Function for all piecewise affine operations, and one for their linear part.

A piecewise affine operation makes choices: which elements are inside a range, or which element is the largest. With
these choices fixed, it is y = L x + k. Its backward is the transpose of L, whose backward is L again, and so on for
every order. L depends on x only through the choices, so no gradient flows to x through L. PyTorch's formulas instead
propagate zeros through the whole forward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgan import backends
from fastgan.ops.filled import mark_base
from fastgan.ops.library import is_batched

DTYPES = frozenset((torch.float32, torch.float64, torch.float16, torch.bfloat16))


class Linear(NamedTuple):
    """A linear map and its transpose. Both take a tensor and the tensors saved by the forward."""

    apply: Callable[..., Tensor]
    transpose: Callable[..., Tensor]


class Step(NamedTuple):
    """The result of an operation and the linear map of its derivative."""

    value: Tensor
    linear: Linear
    kept: tuple[Tensor, ...] = ()
    indices: Tensor | None = None  # a second result, which is not differentiable


def is_eligible(input: Any, inplace: bool = False, empty: bool = False) -> bool:
    """Return whether fastgan handles this input. PyTorch's functions handle all others and raise their own errors."""
    return (
        isinstance(input, Tensor)
        and input.requires_grad
        and not (inplace and input.is_leaf)
        and input.dtype in DTYPES
        and backends.is_known(input.device)
        and not input.is_meta
        and input.layout == torch.strided
        and (empty or input.numel() > 0)
        and backends.is_plain()
    )


def piecewise(input: Tensor, run: Callable[[Tensor], Step], inplace: bool = False, fills_zeros: bool = True) -> Any:
    """Return the value of ``run(input)``, or the value and the indices if there are indices.

    Args:
        input: the differentiable input.
        run: computes the operation.
        inplace: whether ``run`` overwrites its input.
        fills_zeros: whether the double backward of PyTorch's function returns zeros for the input.
    """
    result = _Piecewise.apply(input, run, inplace, fills_zeros)
    if inplace and fills_zeros:
        mark_base(input)
    return result


class _Piecewise(torch.autograd.Function):
    piecewise_affine = True

    @staticmethod
    def forward(ctx: Any, input: Tensor, run: Callable[[Tensor], Step], inplace: bool, fills_zeros: bool) -> Any:
        if inplace:
            ctx.mark_dirty(input)
        value, ctx.linear, kept, indices = run(input)
        ctx.fills_zeros = (0,) if fills_zeros else ()
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*kept)
        if indices is None:
            return value
        ctx.mark_non_differentiable(indices)
        return value, indices

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, None, None, None]:
        return (None if grad is None else _run(grad, ctx.linear, True, ctx.saved_tensors)), None, None, None


def _run(x: Tensor, linear: Linear, transposed: bool, kept: tuple[Tensor, ...]) -> Tensor:
    """Apply the map or its transpose. If the result may be differentiated, apply it as a Function."""
    if torch.is_grad_enabled() and not is_batched(x):
        result: Tensor = _Linear.apply(x, linear, transposed, *kept)
        return result
    return _map(x, linear, transposed, kept)


def _map(x: Tensor, linear: Linear, transposed: bool, kept: tuple[Tensor, ...]) -> Tensor:
    return linear.transpose(x, *kept) if transposed else linear.apply(x, *kept)


class _Linear(torch.autograd.Function):
    piecewise_affine = True

    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: Linear, transposed: bool, *kept: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*kept)
        ctx.linear, ctx.transposed = linear, transposed
        return _map(x, linear, transposed, kept)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        kept = ctx.saved_tensors
        made = None if grad is None else _run(grad, ctx.linear, not ctx.transposed, kept)
        return made, None, None, *[None] * len(kept)


def as_autocast(input: Tensor, casts: bool) -> Tensor:
    """Cast the input to float32 if CPU autocast does so for this function (``casts``)."""
    if casts and input.is_cpu and input.dtype.itemsize < 4 and torch.is_autocast_enabled("cpu"):
        return input.float()
    return input
