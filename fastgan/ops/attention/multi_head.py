"""``torch.nn.functional.multi_head_attention_forward`` with fastgan's attention.

A torch function mode intercepts this function as a whole, but not the attention call inside it. So this module runs its
code with another ``scaled_dot_product_attention`` among its globals.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from types import FunctionType
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from fastgan.ops.attention import scaled_dot_product_attention

_dropout_draws: ContextVar[list[float] | None] = ContextVar("dropout_draws", default=None)


@contextmanager
def dropout_draws() -> Iterator[list[float]]:
    """Yield a list that gets dropout_p of each call of a model's attention that draws fastgan's random numbers."""
    draws: list[float] = []
    token = _dropout_draws.set(draws)
    try:
        yield draws
    finally:
        _dropout_draws.reset(token)


def attention_of_a_model(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """fastgan's attention, except with dropout on a CPU.

    There PyTorch runs its plain form, which has every derivative, and draws its own random numbers.
    """
    reference = dropout_p > 0 and _runs_plain_form(query)
    draws = _dropout_draws.get()
    if dropout_p > 0 and not reference and draws is not None:
        draws.append(dropout_p)
    attend = F.scaled_dot_product_attention if reference else scaled_dot_product_attention
    return attend(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)


def _runs_plain_form(query: Any) -> bool:
    """Return whether PyTorch computes attention with dropout in its plain form."""
    return isinstance(query, Tensor) and query.is_cpu


@cache
def _fused() -> FunctionType:
    reference = F.multi_head_attention_forward
    names = {
        **reference.__globals__,
        "scaled_dot_product_attention": attention_of_a_model,
        "has_torch_function": _has_no_torch_function,
    }
    fused = FunctionType(reference.__code__, names, reference.__name__, reference.__defaults__, reference.__closure__)
    fused.__kwdefaults__ = reference.__kwdefaults__
    return fused


def _has_no_torch_function(tensors: Any) -> bool:
    """Replace ``has_torch_function``, since only plain tensors are rerouted. It always returns False."""
    return False


def multi_head_attention_forward(*args: Any, **kwargs: Any) -> Any:
    return _fused()(*args, **kwargs)
