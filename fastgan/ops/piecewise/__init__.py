"""PyTorch's piecewise affine functions whose own double backward fills zeros, with one that returns nothing instead.

Results, errors, dtypes and layouts are PyTorch's: its own kernels run, forwards and backwards.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastgan.ops.piecewise import elementwise, padding, pooling, prelu

__all__ = ["ROUTES"]

ROUTES: dict[Any, Callable[..., Any]] = {
    **elementwise.ROUTES,
    **padding.ROUTES,
    **pooling.ROUTES,
    **prelu.ROUTES,
}
