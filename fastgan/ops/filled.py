"""Where the double backward of one of PyTorch's functions fills zeros for its input, and fastgan's sends nothing.

A Function that stands for such a function says so by ``fills_zeros``, a tuple of indices of its inputs, of its class or
of a call. In place on a view, its node is hidden in one that PyTorch makes for the view's base.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd.graph import Node

_FILLED = "fastgan: PyTorch fills zeros for the input"


def mark_base(written: Tensor) -> None:
    """To be called after such a Function has written over its input."""
    base: Any = written._base
    if base is not None and base.grad_fn is not None:
        base.grad_fn.metadata[_FILLED] = True


def filled_inputs(node: Node) -> tuple[int, ...]:
    """The indices of a node's inputs that PyTorch would fill zeros for."""
    function: Any = getattr(node, "_forward_cls", None)
    if function is None:
        metadata: Any = node.metadata if type(node).__name__ == "CopySlices" else ()
        return (0,) if _FILLED in metadata else ()
    indices: tuple[int, ...] = getattr(node, "fills_zeros", getattr(function, "fills_zeros", ()))
    return indices
