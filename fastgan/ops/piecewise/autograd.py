"""One Function for every piecewise affine operation, and one for its linear part.

With its choices held fixed (which elements are inside, which was the largest), such an operation is y = L x + k. Its
backward is the transpose of L, whose backward is L again, and so on to any order. L depends on no value of x but the
choices: nothing flows to x through them, where PyTorch's formulas send zeros back through the whole forward.
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
    """A linear map and its transpose, of a tensor and the tensors that the forward kept."""

    apply: Callable[..., Tensor]
    transpose: Callable[..., Tensor]


class Step(NamedTuple):
    """What an operation made of its input."""

    value: Tensor
    linear: Linear
    kept: tuple[Tensor, ...] = ()
    indices: Tensor | None = None  # a further result, not differentiable


def takes(input: Any, inplace: bool = False) -> bool:
    """Whether this is an input of ours; of all others, errors included, PyTorch's own functions take care."""
    return (
        isinstance(input, Tensor)
        and input.requires_grad
        and not (inplace and input.is_leaf)
        and input.dtype in DTYPES
        and backends.is_known(input.device)
        and not input.is_meta
        and input.layout == torch.strided
        and input.numel() > 0
        and backends.is_plain()
    )


def piecewise(input: Tensor, run: Callable[[Tensor], Step], inplace: bool = False, fills_zeros: bool = True) -> Any:
    """``run(input)``: its value, and the indices where there are any.

    Args:
        inplace: run writes over its input.
        fills_zeros: whether the double backward of PyTorch's own function does, for the input.
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
    """The map or its transpose; as a Function where the result may be differentiated."""
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
    """The input as PyTorch's function sees it: autocast makes float32 of it where that is on its list for CPUs."""
    if casts and input.is_cpu and input.dtype.itemsize < 4 and torch.is_autocast_enabled("cpu"):
        return input.float()
    return input
