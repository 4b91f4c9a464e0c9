"""Rules for functions that write one tensor into part of another, in place or not: slices, scatter, index_add."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastgan import backends
from fastgan.ops.gradient_penalty.call import Call, bind, tensors
from fastgan.ops.gradient_penalty.layout import (
    Ineligible,
    Layout,
    MixesSamples,
    adopted,
    is_readable,
    laid_out,
    owners_along,
    selected,
    viewed,
)
from fastgan.ops.gradient_penalty.table import IN_PLACE, functions

_ADDS = set(functions("scatter_add", "index_add"))


def keep_target(call: Call, input: Any, *args: Any, **kwargs: Any) -> None:
    """Store the values of a constant that an in-place call is about to change."""
    if call.func in IN_PLACE and call.layout(input) is None:
        if input.requires_grad:
            raise Ineligible("writes into a tensor that requires a gradient; use the form that is not in place")
        call.source = input.clone()


def _at_zero(call: Call) -> Tensor:
    """Return the result of the call with zeros for all tensors that depend on the input."""
    target = call.args[0]
    if call.source is not None:
        target = call.source
    elif call.layout(target) is not None:
        target = target.new_zeros(target.shape)

    def zeros(value: Any) -> Any:
        return value if call.layout(value) is None else value.new_zeros(value.shape)

    result: Tensor = call.func(target, *bind(zeros, call.args[1:]), **bind(zeros, call.kwargs))
    return target if call.func in IN_PLACE else result  # __setitem__ returns None


def _writes_along(call: Call, input: Tensor, dim: int, index: Tensor, *written: Any, **named: Any) -> Layout:
    """scatter, scatter_add, index_add, index_copy, index_fill: at constant indices along one dimension."""
    call.require_constants(index)
    if isinstance(named.get("alpha"), complex):
        raise Ineligible("has a complex alpha, which PyTorch's gradient does not conjugate")
    dim = dim % input.ndim
    target = call.layout(input)
    if _adds(call, input):
        call.add_constant(_at_zero(call))
    if call.whole is not None:
        raise MixesSamples
    (source,) = tensors((written, named)) or (None,)
    made = call.layout(source)
    if source is None or made is None:
        return call.layout_of(input)
    if dim == made.dim or made.is_whole():
        return _along_samples(call, input, dim, index, owners_along(made, dim, source.shape[dim], call.samples))
    if target not in (None, made) or source.shape[made.dim] != input.shape[made.dim]:  # scatter may write fewer samples
        raise MixesSamples
    return made


def _along_samples(call: Call, input: Tensor, dim: int, index: Tensor, owners: Tensor) -> Layout:
    """Return the layout after a write at indices along the dimension of the samples, given the owners of the source."""
    if not is_readable(index):
        raise MixesSamples
    index = index.cpu()
    adds = call.func in _ADDS
    covers = not adds
    if index.ndim == input.ndim:  # scatter and scatter_add
        shape, each = index.shape, index.movedim(dim, 0)
        covers = covers and shape[:dim] + shape[dim + 1 :] == input.shape[:dim] + input.shape[dim + 1 :]
        index = each.reshape(len(each), -1)[:, :1]
        if not torch.equal(each, index.reshape(-1, *[1] * (each.ndim - 1)).expand_as(each)):
            raise MixesSamples
    index = index.flatten()
    return _with_rows(call, input, dim, index, owners[: len(index)], covers=covers, adds=adds)


def _with_rows(
    call: Call, input: Tensor, dim: int, places: Tensor, owners: Tensor, *, covers: bool, adds: bool = False
) -> Layout:
    """Return the layout after values of these owners were written to places along a dimension.

    Args:
        covers: whether the write replaces all that was at these places.
        adds: whether it adds, so that a place may occur several times.
    """
    target, size = call.layout(input), input.shape[dim]
    places = places % size
    before = owners_along(target, dim, size, call.samples)
    after = before.index_put((places,), owners)
    if target is not None and not covers and (before[places] != owners).any():
        raise MixesSamples
    if (after[places] != owners).any() or (not adds and len(places.unique()) < len(places)):
        raise MixesSamples
    return laid_out(dim, after if target is not None else adopted(after, call.samples), call.samples)


def _adds(call: Call, input: Tensor) -> bool:
    """Return whether the call writes a constant, or into one."""
    written = [*tensors((call.args[1:], call.kwargs))]
    return call.layout(input) is None or all(call.layout(value) is None for value in written)


def _set_item(call: Call, input: Tensor, index: Any, value: Any) -> Layout:
    call.result = input
    call.require_constants(index)
    if isinstance(value, Tensor) and call.layout(value) is not None:
        items = index if isinstance(index, tuple) else (index,)
        if any(isinstance(item, Tensor | list) for item in items):
            return _at_rows(call, input, items, value)
        return _written(call, input, value, lambda target: target[index])
    if not (isinstance(value, int | float) and value == 0):
        call.add_constant(_at_zero(call))
    return call.layout_of(input)


def _index_put(call: Call, input: Tensor, indices: Any, values: Tensor, accumulate: bool = False) -> Layout:
    call.require_constants(indices)
    if call.layout(values) is not None:
        if accumulate:
            raise Ineligible("adds at indices given as tensors; use index_add")
        return _at_rows(call, input, tuple(indices), values)
    call.add_constant(_at_zero(call))
    return call.layout_of(input)


def _at_rows(call: Call, input: Tensor, items: tuple[Any, ...], value: Tensor) -> Layout:
    """Return the layout after ``input[rows] = value``, with a list, an index or a mask of rows."""
    first, *others = items
    rows = torch.tensor(first) if isinstance(first, list) else first
    simple = isinstance(rows, Tensor) and rows.ndim == 1 and rows.dtype != torch.uint8
    if not simple or not all(item is Ellipsis or item == slice(None) for item in others):
        raise Ineligible("writes at indices given as tensors; use slices, or index_copy")
    if not is_readable(rows):
        raise MixesSamples
    if rows.dtype == torch.bool:
        rows = rows.nonzero().flatten()
    rows = rows.cpu()
    if _adds(call, input):
        call.add_constant(_at_zero(call))
    made = call.layout(value)
    if made is None or call.tracer.samples == 1 or (call.whole is not None and call.layout(input) is not None):
        raise MixesSamples
    if not made.is_whole():
        made = made._replace(dim=made.dim - value.ndim + input.ndim)
    return _with_rows(call, input, 0, rows, owners_along(made, 0, len(rows), call.samples), covers=True)


def _fill(call: Call, input: Tensor, value: Any = 0) -> Layout:
    call.require_constants(value)
    if not input._is_view():
        raise Ineligible("overwrites a tensor that depends on the input with a constant")
    call.add_argument(value)
    return call.layout_of(input)


def _masked_scatter(call: Call, input: Tensor, mask: Tensor, source: Tensor) -> Layout:
    """The elements of the source, in order, take the places that the mask selects."""
    call.require_constants(mask)
    layout, made = call.layout(input), call.layout(source)
    if _adds(call, input):
        call.add_constant(_at_zero(call))
    if made is not None and call.whole is None:
        if made != Layout(0) or layout not in (None, made) or call.result.shape[0] != call.samples:
            raise MixesSamples
        if backends.is_lowered():
            raise Ineligible("depends on the values of its mask; use torch.where")
        if (mask.expand(call.result.shape).flatten(1).sum(1) != source[0].numel()).any():
            raise MixesSamples
        layout = made
    if layout is None or call.whole is not None:
        raise MixesSamples
    return layout if call.layout(input) is None else call.broadcast_layout(input)


def _copy(call: Call, input: Tensor, value: Tensor, non_blocking: bool = False) -> Layout:
    if call.layout(value) is None:
        if not input._is_view():
            raise Ineligible("overwrites a tensor that depends on the input with a constant")
        call.add_argument(value)
        return call.layout_of(input)
    layout = call.layout_of(value)
    if value.shape != input.shape:
        raise MixesSamples
    return layout


def _scatter_view(name: str) -> Callable[..., Layout]:
    """slice_scatter, select_scatter and diagonal_scatter: the function that returns the view, by its name."""

    def rule(call: Call, input: Tensor, src: Tensor, *args: Any, **named: Any) -> Layout:
        if name == "slice":
            return _written(call, input, src, lambda target: _slice(target, *args, **named))
        return _written(call, input, src, lambda target: getattr(target, name)(*args, **named))

    return rule


def _slice(target: Tensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Tensor:
    return target[(slice(None),) * (dim % target.ndim) + (slice(start, end, step),)]


def _written(call: Call, input: Tensor, value: Tensor, view: Callable[[Tensor], Tensor]) -> Layout:
    """Return the layout of a tensor into whose view a value was written."""
    if _adds(call, input):
        call.add_constant(_at_zero(call))
    made, target = call.layout(value), call.layout(input)
    if made is None:
        return call.layout_of(input)
    if call.whole is not None and (target is not None or call.tracer.samples == 1):
        raise MixesSamples
    shape = tuple(input.shape)
    inside = view(torch.empty(()).expand(shape))
    if not made.is_whole():
        made = made._replace(dim=made.dim - value.ndim + inside.ndim)
    for dim in range(input.ndim) if target is None else [target.dim]:
        try:
            layout = _written_along(call, input, dim, made, inside.numel(), view)
        except MixesSamples:
            continue
        if layout is not None:
            return layout
    raise MixesSamples


def _written_along(
    call: Call, input: Tensor, dim: int, made: Layout, count: int, view: Callable[[Tensor], Tensor]
) -> Layout | None:
    """Return the layout of a tensor into whose view values were written, if its samples lie along this dimension.

    Args:
        made: the layout of the values.
        count: the number of elements of the view.
    """
    target, shape = call.layout(input), tuple(input.shape)
    if target is not None or (not made.is_whole() and made.size(call.samples) == shape[dim]):
        kept = target or made._replace(dim=dim)
        inside: Layout = viewed(kept, shape, view, call.samples)
        if inside == made or (made.is_whole() and inside.owners == made.owners):
            return kept
    where, places = selected(shape, dim, view)
    if made.is_whole():
        if target is None and (dim != 0 or len(places) == shape[0]):
            return call.whole  # all of the result
    elif where != made.dim:
        raise MixesSamples
    owners = owners_along(made, made.dim, len(places), call.samples)
    return _with_rows(call, input, dim, places, owners, covers=count == len(places) * (input.numel() // shape[dim]))


def into_base(call: Call) -> bool:
    """Move the constants that a call has added to a view to its base, whose node takes the place of the view's.

    Return False if this is impossible.
    """
    view = call.result
    base = view._base
    kinds = [(tensor.dtype, tensor.is_conj(), tensor.is_neg()) for tensor in (base, view)]
    if not base.is_contiguous() or kinds[0] != kinds[1]:  # the view may show parts or conjugates of complex numbers
        return False
    zeros = torch.zeros_like(base)
    place = view.shape, view.stride(), view.storage_offset() - base.storage_offset()
    constants, call.constants = call.constants, []
    call.result = base
    for _, added, _ in constants:
        values = torch.as_tensor(added, dtype=base.dtype, device=base.device).expand(view.shape)
        call.add_constant(torch.as_strided_scatter(zeros, values, *place))
    call.result = view
    return True


# In-place functions that may turn a constant into a tensor that depends on the input.
INTO_CONSTANTS = IN_PLACE.intersection(
    functions(
        *("scatter", "scatter_add", "index_add", "index_copy", "masked_scatter"),
        *("add", "sub", "subtract", "__iadd__", "__isub__"),
    )
) | {Tensor.__setitem__, Tensor.copy_}
WRITES: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys(functions("scatter", "scatter_add", "index_add", "index_copy", "index_fill"), _writes_along),
    **dict.fromkeys(functions("slice_scatter"), _scatter_view("slice")),
    **dict.fromkeys(functions("select_scatter"), _scatter_view("select")),
    **dict.fromkeys(functions("diagonal_scatter"), _scatter_view("diagonal")),
    **dict.fromkeys(functions("masked_scatter"), _masked_scatter),
    **dict.fromkeys(functions("index_put"), _index_put),
    **dict.fromkeys(functions("fill", "zero"), _fill),
    Tensor.__setitem__: _set_item,
    Tensor.copy_: _copy,
}
