"""PyTorch's piecewise affine functions with a double backward that returns None where PyTorch's returns zeros.

Results, errors, dtypes and memory layouts equal PyTorch's, because PyTorch's own kernels run in forward and backward.
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
