"""Record the inputs for which PyTorch's double backward returns zeros and fastgan's returns None.

A Function that replaces such a PyTorch function lists these inputs in ``fills_zeros``, a tuple of input indices. It is
an attribute of the class or of the ctx of one call. If the function works in place on a view, PyTorch hides its node
inside a node of the view's base.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd.graph import Node

_FILLED = "fastgan: PyTorch fills zeros for the input"


def mark_base(written: Tensor) -> None:
    """Mark the base of a view. Call it after such a Function has overwritten its input."""
    base: Any = written._base
    if base is not None and base.grad_fn is not None:
        base.grad_fn.metadata[_FILLED] = True


def filled_inputs(node: Node) -> tuple[int, ...]:
    """Return the indices of a node's inputs for which PyTorch would return zeros."""
    function: Any = getattr(node, "_forward_cls", None)
    if function is None:
        metadata: Any = node.metadata if type(node).__name__ == "CopySlices" else ()
        return (0,) if _FILLED in metadata else ()
    indices: tuple[int, ...] = getattr(node, "fills_zeros", getattr(function, "fills_zeros", ()))
    return indices
