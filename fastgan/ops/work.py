"""Compute the number of multiplications in a call of a torch function from the shapes of its arguments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

NORMALIZED = 2**8  # per element: PyTorch's second derivative of a normalization makes many passes
CALL = 2**22  # the overhead of one Python function, for all orders of derivatives


def work(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Return the multiplications of a call, or 0 if there are few or the function is not known."""
    formula = _FORMULAS.get(func)
    if formula is None:
        return 0
    try:
        return formula(*args, **kwargs)
    except (AttributeError, IndexError, TypeError, ZeroDivisionError):
        return 0  # an invalid call, for which PyTorch raises its own error


def _conv(input: Tensor, weight: Tensor, bias: Any = None, stride: Any = 1, *rest: Any, **named: Any) -> int:
    spatial = weight.ndim - 2
    steps = prod(stride) if isinstance(stride, Sequence) and len(stride) > 1 else _sole(stride) ** spatial
    samples = 1 if input.ndim <= spatial + 1 else len(input)
    return samples * prod(input.shape[-spatial:]) * weight.numel() // steps


def _conv_transpose(input: Tensor, weight: Tensor, *rest: Any, **named: Any) -> int:
    spatial = weight.ndim - 2
    samples = 1 if input.ndim <= spatial + 1 else len(input)
    return samples * prod(input.shape[-spatial:]) * weight.numel()


def _sole(value: Any) -> int:
    return int(value[0] if isinstance(value, Sequence) else value)


def _linear(input: Tensor, weight: Tensor, bias: Any = None) -> int:
    return input.numel() * (weight.shape[0] if weight.ndim > 1 else 1)


def _matmul(left: Tensor, right: Tensor, **named: Any) -> int:
    return left.numel() * (right.shape[-1] if right.ndim > 1 else 1)


def _sum_and_product(input: Tensor, left: Tensor, right: Tensor, **named: Any) -> int:
    return _matmul(left, right)


def _norm(input: Tensor, *rest: Any, **named: Any) -> int:
    return NORMALIZED * input.numel()


_FORMULAS: dict[Any, Callable[..., int]] = {
    **{getattr(owner, f"conv{n}d"): _conv for n in (1, 2, 3) for owner in (F, torch)},
    **{getattr(owner, f"conv_transpose{n}d"): _conv_transpose for n in (1, 2, 3) for owner in (F, torch)},
    F.linear: _linear,
    **dict.fromkeys((torch.matmul, torch.mm, torch.bmm, torch.mv), _matmul),
    **dict.fromkeys((Tensor.matmul, Tensor.__matmul__, Tensor.mm, Tensor.bmm, Tensor.mv), _matmul),
    **dict.fromkeys((torch.addmm, torch.baddbmm, torch.addmv), _sum_and_product),
    **dict.fromkeys((F.layer_norm, F.group_norm, F.instance_norm, F.batch_norm, torch.batch_norm), _norm),
}
