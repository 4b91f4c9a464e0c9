"""What a call of a torch function costs, in multiplications, told by the shapes of its arguments before it runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

NORMALIZED = 2**8  # for an element: PyTorch's second derivative of a normalization goes over it many times
CALL = 2**22  # what a Python function costs at each order of derivative


def work(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Multiplications of this call, or 0 where it has few or they are not known."""
    formula = _FORMULAS.get(func)
    if formula is None:
        return 0
    try:
        return formula(*args, **kwargs)
    except (AttributeError, IndexError, TypeError, ZeroDivisionError):
        return 0  # a call that PyTorch refuses, in its own words


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
