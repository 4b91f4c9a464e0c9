"""The fully connected layer."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

__all__ = ["linear"]


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b: ``torch.nn.functional.linear`` itself, same arguments, results and errors.

    Its double backward is two matrix products, of which autograd forms those that are asked for, and a penalty's first
    pass forms no weight gradient: there is nothing to save (docs/decisions.md).

    Args:
        input: (*, in_features).
        weight: (out_features, in_features), of the input's dtype.
        bias: (out_features,), likewise.

    Returns:
        (*, out_features). Differentiable to any order.
    """
    return F.linear(input, weight, bias)
