"""``torch.nn.functional.multi_head_attention_forward`` with fastgan's attention.

A torch function mode intercepts this function as a whole, but not the attention call inside it. So this module runs its
code with another ``scaled_dot_product_attention`` among its globals.
"""

from __future__ import annotations

from functools import cache
from types import FunctionType
from typing import Any

from torch.nn import functional as F

from fastgan.ops.attention import scaled_dot_product_attention


@cache
def _fused() -> FunctionType:
    reference = F.multi_head_attention_forward
    names = {
        **reference.__globals__,
        "scaled_dot_product_attention": scaled_dot_product_attention,
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
