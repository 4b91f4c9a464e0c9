"""Losses whose chunked form saves the first derivative in place of what the second one needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn import functional as F


def linear_cross_entropy(*args: Any, options: Any = None, **kwargs: Any) -> Tensor:
    """``F.linear_cross_entropy`` without chunks: a linear layer and a cross entropy."""
    result: Tensor = F.linear_cross_entropy(*args, **kwargs)
    return result


ROUTES: dict[Any, Callable[..., Any]] = (  # PyTorch has it since 2.13
    {F.linear_cross_entropy: linear_cross_entropy} if hasattr(F, "linear_cross_entropy") else {}
)
