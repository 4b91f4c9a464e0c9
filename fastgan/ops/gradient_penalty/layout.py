"""Layouts: which dimension of a tensor holds the samples of the batch, and how reshapes and views move it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Ineligible(Exception):
    """This call does not allow one pass. The message gives the reason."""


class MixesSamples(Ineligible):
    """The call mixes samples, or moves them to places that a Layout cannot describe."""

    def __init__(self, why: str = "mixes the samples; one pass requires that samples do not affect each other") -> None:
        super().__init__(why)


_APART = "takes samples apart or moves them; one pass needs all samples in one tensor, in order"


class Layout(NamedTuple):
    """Dimension ``dim`` has size outer * N * inner. Index i along it belongs to sample (i // inner) % N."""

    dim: int
    outer: int = 1
    inner: int = 1


def rows(tensor: Tensor, layout: Layout, samples: int) -> Tensor:
    """Return the values of each sample, (N, M)."""
    if samples == 1:
        return tensor.reshape(1, -1)
    dim, outer, inner = layout
    if outer == inner == 1:
        return tensor.movedim(dim, 0).reshape(samples, -1)
    apart: Tensor = tensor.unflatten(dim, (outer, samples, inner))
    return apart.movedim(dim + 1, 0).reshape(samples, -1)


def sums(tensor: Tensor, layout: Layout, samples: int) -> Tensor:
    """Return the sum over the values of each sample, (N,), in float32 or float64."""
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    if samples == 1:
        return tensor.sum(dtype=dtype).reshape(1)
    dim, outer, inner = layout
    if outer != 1 or inner != 1:
        tensor, dim = tensor.unflatten(dim, (outer, samples, inner)), dim + 1
    others = [d for d in range(tensor.ndim) if d != dim]
    return tensor.sum(others, dtype=dtype) if others else tensor.to(dtype)


def reshaped(layout: Layout, before: Sequence[int], after: Sequence[int], samples: int) -> Layout:
    """Return the layout after a reshape in row-major order."""
    step = layout.inner * prod(before[layout.dim + 1 :])  # elements from one sample to the next
    below = 1
    for dim in reversed(range(len(after))):
        if below * after[dim] > step:
            inner, rest = divmod(step, below)
            if rest or after[dim] % (samples * inner):
                break
            return Layout(dim, after[dim] // (samples * inner), inner)
        below *= after[dim]
    raise MixesSamples


def viewed(layout: Layout, shape: Sequence[int], view: Callable[[Tensor], Any], samples: int) -> Any:
    """Return the layouts of the results of a function that only returns views.

    The function is applied to a stand-in whose stride is 1 along the samples and 0 elsewhere. The strides of the
    results show where the samples went.
    """
    size = shape[layout.dim]
    strides = [int(dim == layout.dim) for dim in range(len(shape))]
    made = view(torch.empty(size).as_strided(shape, strides))
    if isinstance(made, Tensor):
        return _read(made, layout, samples)
    return [_read(part, layout, samples) for part in made]


def _read(stand_in: Tensor, layout: Layout, samples: int) -> Layout:
    stepping = [dim for dim, step in enumerate(stand_in.stride()) if step and stand_in.shape[dim] > 1]
    if len(stepping) != 1 or stand_in.stride(stepping[0]) != 1:
        raise MixesSamples(_APART)
    period = samples * layout.inner
    size = stand_in.shape[stepping[0]]
    if size % period or int(stand_in.storage_offset()) % period:
        raise MixesSamples(_APART)
    return Layout(stepping[0], size // period, layout.inner)


def layout_of_base(view: Tensor, layout: Layout, samples: int) -> Layout | None:
    """Return the layout of the base of a view that has all of its elements, with the dimensions in any order.

    Return None if the view does not have them all, or if no layout describes the base.
    """
    base = view._base
    assert base is not None
    order = sorted(range(view.ndim), key=view.stride, reverse=True)
    ordered = view.permute(order)
    if view.numel() != base.numel() or not base.is_contiguous() or not ordered.is_contiguous():
        return None
    if samples == 1:
        return layout
    try:
        return reshaped(layout._replace(dim=order.index(layout.dim)), ordered.shape, base.shape, samples)
    except MixesSamples:
        return None


def aligned(parts: Sequence[tuple[Layout, Tensor]], shape: Sequence[int]) -> Layout:
    """Return the layout of a result to which tensors with these layouts were broadcast."""
    found = {
        (layout.dim - tensor.ndim, layout.outer, layout.inner, tensor.shape[layout.dim]) for layout, tensor in parts
    }
    if len(found) != 1:
        raise MixesSamples
    ((right, outer, inner, size),) = found
    dim = len(shape) + right
    if shape[dim] != size:
        raise MixesSamples
    return Layout(dim, outer, inner)
