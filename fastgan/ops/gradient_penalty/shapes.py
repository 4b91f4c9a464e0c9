"""Rules for functions that move or sum values. They are linear, so the rules only return layouts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastgan import backends
from fastgan.ops.filtered_lrelu import in_one
from fastgan.ops.gradient_penalty.call import Call, tensors
from fastgan.ops.gradient_penalty.layout import (
    NO_SAMPLE,
    Ineligible,
    Layout,
    MixesSamples,
    adopted,
    laid_out,
    owners_along,
    reshaped,
    viewed,
)
from fastgan.ops.gradient_penalty.table import IN_PLACE, functions
from fastgan.ops.grid_sample import grid_sample
from fastgan.ops.upfirdn2d import upfirdn2d


def _reshape(call: Call, input: Tensor, *shape: Any, **named: Any) -> Layout:
    if any(isinstance(size, torch.dtype) for size in (*shape, *named.values())):
        raise Ineligible("reads the bytes as another dtype")
    return reshaped(call.layout_of(input), input.shape, call.result.shape, call.samples)


def _view(call: Call, input: Tensor, *args: Any, **kwargs: Any) -> Any:
    return call.layout_after_view(input, lambda stand_in: call.func(stand_in, *args, **kwargs))


def keep_shape(call: Call, input: Tensor, *rest: Any, **named: Any) -> None:
    """Store the shape that an in-place call is about to change."""
    call.source = input.shape


def _view_in_place(call: Call, input: Tensor, *args: Any, **kwargs: Any) -> Any:
    return viewed(
        call.layout_of(input), call.source, lambda stand_in: call.func(stand_in, *args, **kwargs), call.samples
    )


def _index(call: Call, input: Tensor, index: Any) -> Any:
    call.require_input(input)
    call.require_constants(index)
    items = list(index) if isinstance(index, tuple) else [index]
    items = [torch.tensor(item) if isinstance(item, list | range) else item for item in items]
    items = [int(item) if _is_integer(item) else item for item in items]
    if not backends.is_lowered():
        items = [part for item in items for part in (item.nonzero(as_tuple=True) if _is_mask(item) else (item,))]
    if any(isinstance(item, Tensor) and item.dtype in (torch.bool, torch.uint8) for item in items):
        raise Ineligible("indexes with a mask; multiply by the mask, or use torch.where")
    picked = [i for i, item in enumerate(items) if isinstance(item, Tensor)]
    if not picked:
        return call.layout_after_view(input, lambda stand_in: stand_in[index])
    basic = tuple(slice(None) if isinstance(item, Tensor) else item for item in items)
    layout: Layout = call.layout_after_view(input, lambda stand_in: stand_in[basic])
    return _pick(call, layout, items, input.ndim)


def _is_mask(item: Any) -> bool:
    return isinstance(item, Tensor) and item.dtype == torch.bool and item.ndim > 0


def _is_integer(item: Any) -> bool:
    if isinstance(item, Tensor):
        return item.ndim == 0 and item.dtype != torch.bool and item.dtype != torch.uint8
    return hasattr(item, "__index__") and not isinstance(item, bool)


def _pick(call: Call, layout: Layout, items: list[Any], ndim: int) -> Layout:
    """Return the layout after index tensors are applied to the result of slices, integers and None."""
    places: list[int] = []  # the dimensions of that result that the index tensors select from
    picking: list[Tensor] = []
    dim = 0
    for item in items:
        if isinstance(item, Tensor):
            places.append(dim)
            picking.append(item)
        if item is Ellipsis:
            dim += ndim - sum(1 for x in items if x is not None and x is not Ellipsis)
        elif not isinstance(item, int) or isinstance(item, bool):
            dim += 1
    together = places == list(range(places[0], places[0] + len(places)))
    start = places[0] if together else 0
    width = max(tensor.ndim for tensor in picking)
    if layout.dim not in places:
        below = sum(place < layout.dim for place in places)
        after = layout.dim >= start if together else True
        return layout._replace(dim=layout.dim - below + (width if after else 0))
    index = picking[places.index(layout.dim)]
    picked = _picked(call, index, layout)
    return picked._replace(dim=start + width - index.ndim + picked.dim)


def _picked(call: Call, index: Tensor, layout: Layout) -> Layout:
    """Return the layout after an index along the dimension of the samples. Its dimension is that of the index."""
    picked: Layout | None = call.tracer.picked(index, layout)
    if picked is None:
        raise MixesSamples("selects samples in a way that one pass cannot follow")
    return picked


def _along(call: Call, input: Tensor, dim: Any, index: Tensor, **named: Any) -> Layout:
    """index_select, gather, take_along_dim with constant indices."""
    call.require_constants(dim, index)
    layout = call.layout_of(input)
    if dim % input.ndim != layout.dim:
        if call.result.shape[layout.dim] != input.shape[layout.dim]:
            raise MixesSamples
        return layout
    picked = _picked(call, index, layout)
    if index.ndim < input.ndim:  # index_select
        return picked._replace(dim=layout.dim)
    if picked.dim != layout.dim and not picked.is_whole():
        raise MixesSamples
    return picked


def _take_along(call: Call, input: Tensor, indices: Tensor, dim: int | None = None) -> Layout:
    if dim is None:
        raise MixesSamples
    return _along(call, input, dim, indices)


def _cat(call: Call, tensors: Sequence[Tensor], dim: int = 0) -> Layout:
    if any(call.layout(t) is None for t in tensors):
        call.add_constant(call.evaluate_at_zero())
    if call.whole is not None:
        raise MixesSamples
    dim = dim % call.result.ndim
    layouts = [call.layout(t) for t in tensors]
    made = [layout for layout in layouts if layout is not None]
    if not any(layout.dim == dim or layout.is_whole() for layout in made):
        return _only(set(made))
    if len(made) == len(tensors) and len({layout._replace(outer=1) for layout in made}) == 1:  # copies of the batch
        return made[0]._replace(outer=sum(layout.outer for layout in made))
    return _laid_side_by_side(call, dim, layouts, [t.shape[dim] for t in tensors])


def _laid_side_by_side(call: Call, dim: int, layouts: Sequence[Layout | None], sizes: Sequence[int]) -> Layout:
    """Return the layout of tensors joined along a dimension that holds the samples, given their sizes there."""
    pairs = zip(layouts, sizes, strict=True)
    owners = torch.cat([owners_along(layout, dim, size, call.samples) for layout, size in pairs])
    if not any(layout and layout.owners and NO_SAMPLE in layout.owners for layout in layouts):
        owners = adopted(owners, call.samples)
    return laid_out(dim, owners, call.samples)


def _only(layouts: set[Layout]) -> Layout:
    """Return the layout that all arguments share."""
    if len(layouts) != 1:
        raise MixesSamples
    return next(iter(layouts))


def _hstack(call: Call, tensors: Sequence[Tensor]) -> Layout:
    return _cat(call, tensors, 0 if tensors[0].ndim == 1 else 1)


def _vstack(call: Call, tensors: Sequence[Tensor]) -> Layout:
    return _stack(call, tensors) if tensors[0].ndim == 1 else _cat(call, tensors)


def _dstack(call: Call, tensors: Sequence[Tensor]) -> Layout:
    if tensors[0].ndim == 1:
        raise MixesSamples
    return _stack(call, tensors, 2) if tensors[0].ndim == 2 else _cat(call, tensors, 2)


def _column_stack(call: Call, tensors: Sequence[Tensor]) -> Layout:
    if len({tensor.ndim for tensor in tensors}) > 1:
        raise Ineligible("was given vectors and matrices; one pass needs tensors with the same number of dimensions")
    return _stack(call, tensors, 1) if tensors[0].ndim == 1 else _cat(call, tensors, 1)


def _stack(call: Call, tensors: Sequence[Tensor], dim: int = 0) -> Layout:
    if any(call.layout(t) is None for t in tensors):
        call.add_constant(call.evaluate_at_zero())
    if call.whole is not None:
        raise MixesSamples
    dim = dim % call.result.ndim
    layouts = [call.layout(t) for t in tensors]
    if all(layout is None or layout.is_whole() for layout in layouts):
        return _laid_side_by_side(call, dim, layouts, [1] * len(layouts))
    layout = _only({layout for layout in layouts if layout is not None})
    return layout._replace(dim=layout.dim + (dim <= layout.dim))


def reduced(call: Call, input: Tensor, dim: Any = None, keepdim: bool = False, **named: Any) -> Layout:
    """Sums, means and maxima over some dimensions or all."""
    layout = call.layout_of(input)
    dims = [dim] if isinstance(dim, int) else list(dim or range(input.ndim))
    dims = [d % input.ndim for d in dims]
    if layout.dim in dims:
        raise MixesSamples
    return layout if keepdim else layout._replace(dim=layout.dim - sum(d < layout.dim for d in dims))


def _kth(call: Call, input: Tensor, k: int, dim: int = -1, keepdim: bool = False) -> Layout:
    return reduced(call, input, dim, keepdim)


def _within(call: Call, input: Tensor, dim: int = -1, *rest: Any, **named: Any) -> Layout:
    """Functions along one dimension that keep the shape: sort, cumsum, cummax."""
    layout = call.layout_of(input)
    if dim % input.ndim == layout.dim:
        raise MixesSamples
    return layout


def _diff(
    call: Call, input: Tensor, n: int = 1, dim: int = -1, prepend: Tensor | None = None, append: Tensor | None = None
) -> Layout:
    if any(call.layout(t) is None for t in tensors((prepend, append))):
        call.add_constant(call.evaluate_at_zero())
    layout = _only({call.layout_of(t) for t in tensors((input, prepend, append)) if call.layout(t) is not None})
    if dim % input.ndim == layout.dim:
        raise MixesSamples
    return layout


def _topk(call: Call, input: Tensor, k: int, dim: int = -1, *rest: Any, **named: Any) -> Layout:
    return _within(call, input, dim)


def _trailing(count: int) -> Callable[..., Layout]:
    """Functions of the last ``count`` dimensions: pooling, pixel shuffles."""

    def rule(call: Call, input: Tensor, *rest: Any, **named: Any) -> Layout:
        call.require_constants(rest, named)
        return call.layout_before(input, count)

    return rule


def _resample(call: Call, input: Tensor, *rest: Any, **named: Any) -> Layout:
    call.require_constants(rest, named)
    return call.layout_before(input, input.ndim - 2)


def _of_rows(call: Call, input: Tensor, *rest: Any, **named: Any) -> Layout:
    """Functions that process each row of the first dimension separately."""
    call.require_constants(rest, named)
    return call.layout_before(input, input.ndim - 1)


def _pad(call: Call, input: Tensor, pad: Any, mode: str = "constant", value: float | None = None) -> Layout:
    call.require_input(input)
    if mode == "constant" and value:
        call.add_constant(call.evaluate_at_zero())
    sides = list(pad)
    while sides and sides[-1] == 0:
        sides.pop()
    return call.layout_before(input, (len(sides) + 1) // 2)


def _repeat(call: Call, input: Tensor, *sizes: Any, **named: Any) -> Layout:
    layout = call.layout_of(input)
    moved = call.result.ndim - input.ndim
    dim = layout.dim + moved
    times = call.result.shape[dim] // input.shape[layout.dim]
    return layout._replace(dim=dim, outer=layout.outer * times)


def _repeat_interleave(call: Call, input: Tensor, repeats: Any, dim: int | None = None, **named: Any) -> Layout:
    layout = call.layout_of(input)
    if dim is None:
        raise MixesSamples
    if dim % input.ndim != layout.dim:
        return layout
    if not isinstance(repeats, int):
        raise MixesSamples
    return layout._replace(inner=layout.inner * repeats)


def _flip(call: Call, input: Tensor, *dims: Any, **named: Any) -> Layout:
    layout = call.layout_of(input)
    if layout.dim not in _dims(input, *dims, *named.values()):
        return layout
    return _moved(call, layout, lambda owners: owners.flip(0))


def _moved(call: Call, layout: Layout, move: Callable[[Tensor], Tensor]) -> Layout:
    """Return the layout after a function has moved the values along the dimension of the samples."""
    owners = owners_along(layout, layout.dim, layout.size(call.samples), call.samples)
    return laid_out(layout.dim, move(owners), call.samples)


def apart_from(call: Call, input: Tensor, *dims: Any) -> Layout:
    """Return the layout of the input. Its samples must not lie along ``dims``."""
    layout = call.layout_of(input)
    numbers = _dims(input, *dims)
    if not numbers or layout.dim in numbers:
        raise MixesSamples
    return layout


def _dims(input: Tensor, *dims: Any) -> list[int]:
    """Return the numbers of dimensions given as integers, lists or tuples."""
    return [d % input.ndim for dim in dims for d in (dim if isinstance(dim, list | tuple) else (dim,))]


def _fliplr(call: Call, input: Tensor) -> Layout:
    return _flip(call, input, 1)


def _flipud(call: Call, input: Tensor) -> Layout:
    return _flip(call, input, 0)


def _rot90(call: Call, input: Tensor, k: int = 1, dims: Any = (0, 1)) -> Layout:
    return apart_from(call, input, dims)


def _roll(call: Call, input: Tensor, shifts: Any, dims: Any = None) -> Layout:
    layout = call.layout_of(input)
    numbers = _dims(input, () if dims is None else dims)
    if not numbers:
        raise MixesSamples
    by = [shifts] if isinstance(shifts, int) else shifts
    shift = sum(shift for shift, dim in zip(by, numbers, strict=True) if dim == layout.dim)
    if not shift:
        return layout
    return _moved(call, layout, lambda owners: owners.roll(shift))


_VIEWS = (
    *("permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis", "t", "T", "mT", "H", "mH", "adjoint"),
    *("narrow", "select", "unbind", "chunk", "split", "split_with_sizes", "tensor_split", "hsplit", "vsplit", "dsplit"),
    *("expand", "expand_as", "broadcast_to", "squeeze", "unsqueeze", "diagonal", "unfold"),
    *("atleast_1d", "atleast_2d", "atleast_3d"),
)
VIEWS_IN_PLACE: dict[Any, Callable[..., Any]] = {
    function: _view_in_place
    for function in functions("squeeze", "unsqueeze", "transpose", "swapaxes", "swapdims", "t")
    if function in IN_PLACE
}
_POOLINGS = ("avg_pool", "adaptive_avg_pool", "max_pool", "adaptive_max_pool", "fractional_max_pool", "max_unpool")
_RESHAPES = ("view", "reshape", "view_as", "reshape_as", "flatten", "unflatten", "ravel")
SHAPES: dict[Any, Callable[..., Any]] = {
    **{function: _view for function in functions(*_VIEWS) if function not in IN_PLACE},
    **{function: _reshape for function in functions(*_RESHAPES) if function not in IN_PLACE},
    Tensor.__getitem__: _index,
    **dict.fromkeys(functions("index_select", "gather"), _along),
    **dict.fromkeys(functions("take_along_dim"), _take_along),
    **dict.fromkeys(functions("cat", "concat", "concatenate"), _cat),
    **dict.fromkeys(functions("stack"), _stack),
    **dict.fromkeys(functions("hstack"), _hstack),
    **dict.fromkeys(functions("vstack", "row_stack"), _vstack),
    **dict.fromkeys(functions("dstack"), _dstack),
    **dict.fromkeys(functions("column_stack"), _column_stack),
    **dict.fromkeys(functions("sum", "mean", "amax", "amin"), reduced),
    **dict.fromkeys(functions("median"), reduced),
    **dict.fromkeys(functions("kthvalue"), _kth),
    **dict.fromkeys(functions("sort", "cumsum", "cummax", "cummin"), _within),
    **dict.fromkeys(functions("topk"), _topk),
    torch.diff: _diff,
    Tensor.diff: _diff,
    **{
        function: _trailing(n)
        for n in (1, 2, 3)
        for name in (
            "avg_pool",
            "adaptive_avg_pool",
            "max_pool",
            "max_unpool",
            "adaptive_max_pool",
            "fractional_max_pool",
        )
        for form in (f"{name}{n}d", f"_{name}{n}d", f"{name}{n}d_with_indices")
        for function in functions(form)
    },
    **dict.fromkeys(functions("interpolate", "upsample", "upsample_nearest", "upsample_bilinear"), _resample),
    grid_sample: _of_rows,
    **dict.fromkeys(functions("grid_sample", "channel_shuffle", "native_channel_shuffle"), _of_rows),
    **dict.fromkeys(functions("pixel_shuffle", "pixel_unshuffle"), _trailing(3)),
    **dict.fromkeys((upfirdn2d, in_one), _trailing(2)),
    F.pad: _pad,
    **dict.fromkeys((F.unfold, F.fold), _of_rows),
    **dict.fromkeys(functions("repeat", "tile"), _repeat),
    **dict.fromkeys(functions("repeat_interleave"), _repeat_interleave),
    **dict.fromkeys(functions("flip"), _flip),
    **dict.fromkeys(functions("fliplr"), _fliplr),
    **dict.fromkeys(functions("flipud"), _flipud),
    **dict.fromkeys(functions("rot90"), _rot90),
    **dict.fromkeys(functions("roll"), _roll),
}
