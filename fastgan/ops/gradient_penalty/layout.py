"""Layouts: which dimension of a tensor holds the samples of the batch, and how reshapes and views move it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from math import gcd, prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgan import backends


class Ineligible(Exception):
    """This call does not allow one pass. The message gives the reason."""


class MixesSamples(Ineligible):
    """The call mixes samples, or moves them to places that a Layout cannot describe."""

    def __init__(self, why: str = "mixes the samples; one pass requires that samples do not affect each other") -> None:
        super().__init__(why)


_APART = "takes samples apart or moves them in a way that one pass cannot follow"


class Layout(NamedTuple):
    """Dimension ``dim`` has size outer * K * inner. Index i along it belongs to the owner (i // inner) % K.

    The K owners are the N samples in order, unless ``owners`` lists them. It does so after slices, indices and writes
    that take samples apart. The owner NO_SAMPLE stands for values that depend on no sample.
    """

    dim: int
    outer: int = 1
    inner: int = 1
    owners: tuple[int, ...] | None = None

    def count(self, samples: int) -> int:
        """Return the number of owners, K."""
        return samples if self.owners is None else len(self.owners)

    def size(self, samples: int) -> int:
        """Return the size of the dimension."""
        return self.outer * self.count(samples) * self.inner

    def is_whole(self) -> bool:
        """Return whether the tensor belongs to one sample, or to none. Then ``dim`` has no meaning."""
        return self.owners is not None and len(self.owners) == 1

    def has_each_equally(self, samples: int) -> bool:
        """Return whether all samples own equally many values."""
        if self.owners is None:
            return True
        counts = Counter(self.owners)
        return counts.keys() == set(range(samples)) and len(set(counts.values())) == 1


NO_SAMPLE = -1


def whole(owner: int) -> Layout:
    """Return the layout of a tensor that belongs to one sample."""
    return Layout(0, owners=(owner,))


def laid_out(dim: int, owners: Tensor, samples: int) -> Layout:
    """Return the layout of a tensor, given the owner of each index along one dimension."""
    if not owners.numel():
        return whole(0)  # nothing, which may belong to any sample
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        raise MixesSamples(_APART)  # sums over owners copy their places from the CPU
    ends = ((owners[1:] != owners[:-1]).nonzero().flatten() + 1).tolist()
    if not ends:
        return whole(int(owners[0]))
    inner = gcd(*ends, len(owners))
    each = tuple(owners[::inner].tolist())
    outer, rest = divmod(len(each), samples)
    if not rest and each == (*range(samples),) * outer:
        return Layout(dim, outer, inner)
    return Layout(dim, 1, inner, each)


def owners_at(layout: Layout, index: Tensor, samples: int) -> Tensor:
    """Return the owners of these indices along the dimension of the layout."""
    if layout.owners is None:
        return index.div(layout.inner, rounding_mode="floor") % samples
    owners = torch.tensor(layout.owners, device=index.device)
    return owners[index.div(layout.inner, rounding_mode="floor") % len(owners)]


def owners_along(layout: Layout | None, dim: int, size: int, samples: int) -> Tensor:
    """Return the owner of each index along a dimension of this size. The layout of a constant is None."""
    if backends.is_lowered():
        raise MixesSamples(_APART)  # a compiled graph holds for any number of samples
    if layout is None:
        return torch.full((size,), NO_SAMPLE)
    if layout.dim != dim and not layout.is_whole():
        raise MixesSamples
    return owners_at(layout, torch.arange(size), samples)


def adopted(owners: Tensor, samples: int) -> Tensor:
    """Give the indices of constants that a call has just declared to samples.

    Any sample will do: a constant counts for the sample that owns its place. So they go to the samples in order, if
    the other indices allow it. Then later calls can join these places with the samples to which they seem to belong.
    """
    each = torch.arange(len(owners))
    for guess in (each.div(max(len(owners) // samples, 1), rounding_mode="floor"), each % samples):
        if len(owners) % samples == 0 and ((owners == NO_SAMPLE) | (owners == guess)).all():
            return guess
    return owners


def is_readable(index: Tensor) -> bool:
    """Return whether the values of an index may be read. They may not be while a graph is recorded."""
    return not backends.is_lowered() and not (index.is_cuda and torch.cuda.is_current_stream_capturing())


def rows(tensor: Tensor, layout: Layout, samples: int) -> Tensor:
    """Return the values of each sample, (N, M). All samples must own equally many."""
    if samples == 1:
        return tensor.reshape(1, -1)
    dim, outer, inner, owners = layout
    if outer == inner == 1 and owners is None:
        return tensor.movedim(dim, 0).reshape(samples, -1)
    apart: Tensor = tensor.unflatten(dim, (outer, layout.count(samples), inner))
    apart = apart.movedim(dim + 1, 0)
    if owners is not None:
        apart = apart[torch.tensor(owners, device=apart.device).argsort(stable=True)]
    return apart.reshape(samples, -1)


def sums(tensor: Tensor, layout: Layout, samples: int) -> Tensor:
    """Return the sum over the values of each sample, (N,), in float32 or float64."""
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    if samples == 1:
        return tensor.sum(dtype=dtype).reshape(1)
    dim, outer, inner, owners = layout
    if layout.is_whole():
        return _sums_of_owners(tensor.sum(dtype=dtype).reshape(1), layout, samples)
    if outer != 1 or inner != 1:
        tensor, dim = tensor.unflatten(dim, (outer, layout.count(samples), inner)), dim + 1
    others = [d for d in range(tensor.ndim) if d != dim]
    found = tensor.sum(others, dtype=dtype) if others else tensor.to(dtype)
    return found if owners is None else _sums_of_owners(found, layout, samples)


def _sums_of_owners(values: Tensor, layout: Layout, samples: int) -> Tensor:
    """Add the values of each sample, (K,) to (N,). The order of the sum is fixed, unlike that of index_add on GPUs."""
    assert layout.owners is not None
    places: list[list[int]] = [[] for _ in range(samples)]
    for place, owner in enumerate(layout.owners):
        if owner != NO_SAMPLE:
            places[owner].append(place)
    most = max(map(len, places))
    zero = len(layout.owners)
    index = torch.tensor([each + [zero] * (most - len(each)) for each in places], device=values.device)
    return torch.cat([values, values.new_zeros(1)])[index].sum(1)


def reshaped(layout: Layout, before: Sequence[int], after: Sequence[int], samples: int) -> Layout:
    """Return the layout after a reshape in row-major order."""
    step = layout.inner * prod(before[layout.dim + 1 :])  # elements from one sample to the next
    count = layout.count(samples)
    below = 1
    for dim in reversed(range(len(after))):
        if below * after[dim] > step:
            inner, rest = divmod(step, below)
            if rest or after[dim] % (count * inner):
                break
            return layout._replace(dim=dim, outer=after[dim] // (count * inner), inner=inner)
        below *= after[dim]
    raise MixesSamples


def viewed(layout: Layout, shape: Sequence[int], view: Callable[[Tensor], Any], samples: int) -> Any:
    """Return the layouts of the results of a function that only returns views."""
    made = view(_stand_in(shape, layout.dim))
    if isinstance(made, Tensor):
        return _read(made, layout, samples)
    return [_read(part, layout, samples) for part in made]


def _stand_in(shape: Sequence[int], dim: int) -> Tensor:
    """Return a tensor whose stride is 1 along one dimension and 0 elsewhere. The strides of its views show where they
    have this dimension, and which part."""
    return torch.empty(shape[dim]).as_strided(shape, [int(d == dim) for d in range(len(shape))])


def selected(shape: Sequence[int], dim: int, view: Callable[[Tensor], Tensor]) -> tuple[int | None, Tensor]:
    """Return what a view selects along a dimension: the dimension in the view, or None, and the indices."""
    return _selected(view(_stand_in(shape, dim)))


def _selected(stand_in: Tensor) -> tuple[int | None, Tensor]:
    dim, start = _stepping(stand_in), int(stand_in.storage_offset())
    if dim is None:
        return None, torch.tensor([start])
    return dim, start + stand_in.stride(dim) * torch.arange(stand_in.shape[dim])


def _stepping(stand_in: Tensor) -> int | None:
    found = [dim for dim, step in enumerate(stand_in.stride()) if step and stand_in.shape[dim] > 1]
    if len(found) > 1:
        raise MixesSamples(_APART)
    return found[0] if found else None


def _read(stand_in: Tensor, layout: Layout, samples: int) -> Layout:
    dim = _stepping(stand_in)
    if dim is not None and stand_in.stride(dim) == 1:
        period = layout.inner * layout.count(samples)
        size = stand_in.shape[dim]
        if size % period == 0 and int(stand_in.storage_offset()) % period == 0:
            return layout._replace(dim=dim, outer=size // period)
    if backends.is_lowered():
        raise MixesSamples(_APART)
    return laid_out(dim or 0, owners_at(layout, _selected(stand_in)[1], samples), samples)


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
    try:
        return reshaped(layout._replace(dim=order.index(layout.dim)), ordered.shape, base.shape, samples)
    except MixesSamples:
        return None


def aligned(parts: Sequence[tuple[Layout, Tensor]], shape: Sequence[int]) -> Layout:
    """Return the layout of a result to which tensors with these layouts were broadcast."""
    found = {(layout._replace(dim=layout.dim - tensor.ndim), tensor.shape[layout.dim]) for layout, tensor in parts}
    if len(found) != 1:
        raise MixesSamples
    ((layout, size),) = found
    dim = len(shape) + layout.dim
    if shape[dim] != size:
        raise MixesSamples
    return layout._replace(dim=dim)
