"""How far two tensors are apart, whatever their layout and dtype."""

from __future__ import annotations

import math

import torch
from torch import Tensor


@torch.no_grad()
def norm(tensor: Tensor) -> float:
    values = _exact(tensor)
    return float(values[values.isfinite()].norm())


def distance(actual: Tensor | None, wanted: Tensor) -> float:
    """Return the norm of the difference. It is infinite if the shapes or the non-finite elements differ."""
    apart = _difference(actual, wanted)
    return math.inf if apart is None else float(apart.norm())


def largest_difference(actual: Tensor | None, wanted: Tensor) -> float:
    """Return the largest difference of two elements, infinite in the same cases."""
    apart = _difference(actual, wanted)
    return math.inf if apart is None else float(apart.abs().max()) if apart.numel() else 0.0


@torch.no_grad()
def _difference(actual: Tensor | None, wanted: Tensor) -> Tensor | None:
    """Return the differences of the finite elements, or None if the shapes or the other elements differ."""
    if actual is None or actual.shape != wanted.shape:
        return None
    a, w = _exact(actual), _exact(wanted)
    finite = w.isfinite()
    if not torch.equal(a.isfinite(), finite) or not torch.equal(a[~finite].nan_to_num(), w[~finite].nan_to_num()):
        return None
    return a[finite] - w[finite]


def _exact(tensor: Tensor) -> Tensor:
    dense = tensor.detach().to_dense() if tensor.layout != torch.strided else tensor.detach()
    dense = dense.dequantize() if dense.is_quantized else dense
    return (torch.view_as_real(dense) if dense.is_complex() else dense).double()
