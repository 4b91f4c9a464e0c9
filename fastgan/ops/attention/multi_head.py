"""``torch.nn.functional.multi_head_attention_forward`` on fastgan's attention.

It is a torch function as a whole, so that a mode sees it and not the attention that it calls. Here its own code runs
with another ``scaled_dot_product_attention`` among its globals.
"""

from __future__ import annotations

from functools import cache
from types import FunctionType
from typing import Any

from torch.nn import functional as F

from fastgan.ops.attention import scaled_dot_product_attention


@cache
def _with_ours() -> FunctionType:
    theirs = F.multi_head_attention_forward
    names = {
        **theirs.__globals__,
        "scaled_dot_product_attention": scaled_dot_product_attention,
        "has_torch_function": _is_plain,
    }
    ours = FunctionType(theirs.__code__, names, theirs.__name__, theirs.__defaults__, theirs.__closure__)
    ours.__kwdefaults__ = theirs.__kwdefaults__
    return ours


def _is_plain(tensors: Any) -> bool:
    """In place of ``has_torch_function``: what is rerouted has no torch functions of its own."""
    return False


def multi_head_attention_forward(*args: Any, **kwargs: Any) -> Any:
    return _with_ours()(*args, **kwargs)
