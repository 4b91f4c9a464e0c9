"""Where the samples lie in a tensor that was made from a batch, and what happens to them as its shape changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Refused(Exception):
    """One pass does not do for this call; the message says why."""


class Mixed(Refused):
    """What belongs to different samples comes together, or is not where a layout can say."""

    def __init__(self, why: str = "it mixes the samples; one pass needs every sample to be judged by itself") -> None:
        super().__init__(why)


class Layout(NamedTuple):
    """Dimension ``dim`` has the size outer * N * inner, and index i along it belongs to sample (i // inner) % N."""

    dim: int
    outer: int = 1
    inner: int = 1


def rows(tensor: Tensor, layout: Layout, samples: int) -> Tensor:
    """(N, M): the values of each sample."""
    if samples == 1:
        return tensor.reshape(1, -1)
    dim, outer, inner = layout
    if outer == inner == 1:
        return tensor.movedim(dim, 0).reshape(samples, -1)
    apart: Tensor = tensor.unflatten(dim, (outer, samples, inner))
    return apart.movedim(dim + 1, 0).reshape(samples, -1)


def sums(tensor: Tensor, layout: Layout, samples: int) -> Tensor:
    """(N,): the sum over each sample's values, in float32 or more."""
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    if samples == 1:
        return tensor.sum(dtype=dtype).reshape(1)
    dim, outer, inner = layout
    if outer != 1 or inner != 1:
        tensor, dim = tensor.unflatten(dim, (outer, samples, inner)), dim + 1
    others = [d for d in range(tensor.ndim) if d != dim]
    return tensor.sum(others, dtype=dtype) if others else tensor.to(dtype)


def reshaped(layout: Layout, before: Sequence[int], after: Sequence[int], samples: int) -> Layout:
    """The layout once a tensor is read in row-major order in another shape."""
    step = layout.inner * prod(before[layout.dim + 1 :])  # elements from one sample to the next
    below = 1
    for dim in reversed(range(len(after))):
        if below * after[dim] > step:
            inner, rest = divmod(step, below)
            if rest or after[dim] % (samples * inner):
                break
            return Layout(dim, after[dim] // (samples * inner), inner)
        below *= after[dim]
    raise Mixed


def viewed(layout: Layout, shape: Sequence[int], view: Callable[[Tensor], Any], samples: int) -> Any:
    """The layouts of what a function that only makes views makes of a tensor.

    It is applied to a stand-in of one number a step along the samples, whose strides then tell where they went.
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
        raise Mixed
    period = samples * layout.inner
    size = stand_in.shape[stepping[0]]
    if size % period or int(stand_in.storage_offset()) % period:
        raise Mixed
    return Layout(stepping[0], size // period, layout.inner)


def aligned(parts: Sequence[tuple[Layout, Tensor]], shape: Sequence[int]) -> Layout:
    """The layout of a result that tensors with these layouts were broadcast to."""
    found = {
        (layout.dim - tensor.ndim, layout.outer, layout.inner, tensor.shape[layout.dim]) for layout, tensor in parts
    }
    if len(found) != 1:
        raise Mixed
    ((right, outer, inner, size),) = found
    dim = len(shape) + right
    if shape[dim] != size:
        raise Mixed
    return Layout(dim, outer, inner)
