"""The fully connected layer."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

__all__ = ["linear"]


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute x W^T + b. This is ``torch.nn.functional.linear`` itself, with the same arguments, results and errors.

    Order of derivative: any. A fused kernel would save nothing: the double backward consists of two matrix products,
    autograd computes only those that are requested, and the first pass of a penalty computes no weight gradient
    (docs/decisions.md).

    ```python
    import torch
    import fastgan

    y = fastgan.ops.linear(torch.randn(8, 32), torch.randn(1, 32))
    ```

    Args:
        input: (*, in_features), any floating-point dtype.
        weight: (out_features, in_features), dtype of the input.
        bias: (out_features,), dtype of the input, or None.

    Returns:
        (*, out_features), dtype of the input.

    Raises:
        RuntimeError, TypeError, ValueError: as in PyTorch's function.
    """
    return F.linear(input, weight, bias)
