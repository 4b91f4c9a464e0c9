"""Rules of what moves values about or sums them: linear, so that all there is to say is where the samples go."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastgan.ops.filtered_lrelu import in_one
from fastgan.ops.gradient_penalty.call import Call
from fastgan.ops.gradient_penalty.layout import Layout, Mixed, Refused, reshaped
from fastgan.ops.gradient_penalty.table import IN_PLACE, functions
from fastgan.ops.grid_sample import grid_sample
from fastgan.ops.upfirdn2d import upfirdn2d


def _reshape(call: Call, input: Tensor, *shape: Any, **named: Any) -> Layout:
    if any(isinstance(size, torch.dtype) for size in (*shape, *named.values())):
        raise Refused("reads the bytes as another dtype")
    return reshaped(call.where(input), input.shape, call.result.shape, call.samples)


def _view(call: Call, input: Tensor, *args: Any, **kwargs: Any) -> Any:
    return call.viewed(input, lambda stand_in: call.func(stand_in, *args, **kwargs))


def _index(call: Call, input: Tensor, index: Any) -> Any:
    call.needs(input)
    call.fixed(index)
    items = list(index) if isinstance(index, tuple) else [index]
    items = [torch.tensor(item) if isinstance(item, list | range) else item for item in items]
    items = [int(item) if _is_integer(item) else item for item in items]
    if any(isinstance(item, Tensor) and item.dtype in (torch.bool, torch.uint8) for item in items):
        raise Refused("picks by a mask; multiply by it, or use torch.where")
    picked = [i for i, item in enumerate(items) if isinstance(item, Tensor)]
    if not picked:
        return call.viewed(input, lambda stand_in: stand_in[index])
    basic = tuple(slice(None) if isinstance(item, Tensor) else item for item in items)
    layout: Layout = call.viewed(input, lambda stand_in: stand_in[basic])
    return _pick(call, layout, items, input.ndim)


def _is_integer(item: Any) -> bool:
    if isinstance(item, Tensor):
        return item.ndim == 0 and item.dtype != torch.bool and item.dtype != torch.uint8
    return hasattr(item, "__index__") and not isinstance(item, bool)


def _pick(call: Call, layout: Layout, items: list[Any], ndim: int) -> Layout:
    """The layout once tensors of indices pick from what slices, integers and None have left."""
    places: list[int] = []  # of the picking tensors, in what is left
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
    wide = [dim for dim, size in enumerate(index.shape) if size != 1]
    size = layout.outer * call.samples * layout.inner
    if len(wide) != 1 or not call.tracer.counts(index, size):
        raise Mixed("picks samples; one pass needs them all, in their order")
    return layout._replace(dim=start + width - index.ndim + wide[0])


def _along(call: Call, input: Tensor, dim: Any, index: Tensor, **named: Any) -> Layout:
    """index_select, gather, take_along_dim: constant indices, along another dimension than the samples'."""
    call.fixed(dim, index)
    layout = call.where(input)
    if dim % input.ndim == layout.dim or call.result.shape[layout.dim] != input.shape[layout.dim]:
        raise Mixed
    return layout


def _take_along(call: Call, input: Tensor, indices: Tensor, dim: int | None = None) -> Layout:
    if dim is None:
        raise Mixed
    return _along(call, input, dim, indices)


def _cat(call: Call, tensors: Sequence[Tensor], dim: int = 0) -> Layout:
    if any(call.layout(t) is None for t in tensors):
        call.constant(call.at_zero())
    made = [(call.where(t), t) for t in tensors if call.layout(t) is not None]
    layout = made[0][0]
    if dim % call.result.ndim == layout.dim:
        if len(made) < len(tensors):
            raise Mixed
        return _cat_samples([other for other, _ in made])
    if any(other != layout for other, _ in made):
        raise Mixed
    return layout


def _cat_samples(layouts: list[Layout]) -> Layout:
    """Of copies of the batch, one after another."""
    first = layouts[0]
    if any((other.dim, other.inner) != (first.dim, first.inner) for other in layouts):
        raise Mixed
    return first._replace(outer=sum(layout.outer for layout in layouts))


def _hstack(call: Call, tensors: Sequence[Tensor]) -> Layout:
    return _cat(call, tensors, 0 if tensors[0].ndim == 1 else 1)


def _stack(call: Call, tensors: Sequence[Tensor], dim: int = 0) -> Layout:
    if any(call.layout(t) is None for t in tensors):
        call.constant(call.at_zero())
    layouts = {call.where(t) for t in tensors if call.layout(t) is not None}
    if len(layouts) != 1:
        raise Mixed
    (layout,) = layouts
    return layout._replace(dim=layout.dim + (dim % call.result.ndim <= layout.dim))


def reduced(call: Call, input: Tensor, dim: Any = None, keepdim: bool = False, **named: Any) -> Layout:
    """A sum, a mean or the largest values over dimensions, or over all."""
    layout = call.where(input)
    dims = [dim] if isinstance(dim, int) else list(dim or range(input.ndim))
    dims = [d % input.ndim for d in dims]
    if layout.dim in dims:
        raise Mixed
    return layout if keepdim else layout._replace(dim=layout.dim - sum(d < layout.dim for d in dims))


def _kth(call: Call, input: Tensor, k: int, dim: int = -1, keepdim: bool = False) -> Layout:
    return reduced(call, input, dim, keepdim)


def _within(call: Call, input: Tensor, dim: int = -1, *rest: Any, **named: Any) -> Layout:
    """Along one dimension, which keeps its place: sort, cumsum."""
    layout = call.where(input)
    if dim % input.ndim == layout.dim:
        raise Mixed
    return layout


def _topk(call: Call, input: Tensor, k: int, dim: int = -1, *rest: Any, **named: Any) -> Layout:
    return _within(call, input, dim)


def _trailing(count: int) -> Callable[..., Layout]:
    """Functions of the last dimensions: poolings, pixel shuffles."""

    def rule(call: Call, input: Tensor, *rest: Any, **named: Any) -> Layout:
        call.fixed(rest, named)
        return call.above(input, count)

    return rule


def _resample(call: Call, input: Tensor, *rest: Any, **named: Any) -> Layout:
    call.fixed(rest, named)
    return call.above(input, input.ndim - 2)


def _of_rows(call: Call, input: Tensor, *rest: Any, **named: Any) -> Layout:
    """Functions that take each row of the first dimension by itself, and only that."""
    call.fixed(rest, named)
    return call.above(input, input.ndim - 1)


def _pad(call: Call, input: Tensor, pad: Any, mode: str = "constant", value: float | None = None) -> Layout:
    call.needs(input)
    if mode == "constant" and value:
        call.constant(call.at_zero())
    return call.above(input, len(pad) // 2)


def _repeat(call: Call, input: Tensor, *sizes: Any, **named: Any) -> Layout:
    layout = call.where(input)
    moved = call.result.ndim - input.ndim
    dim = layout.dim + moved
    times = call.result.shape[dim] // input.shape[layout.dim]
    return Layout(dim, layout.outer * times, layout.inner)


def _repeat_interleave(call: Call, input: Tensor, repeats: Any, dim: int | None = None, **named: Any) -> Layout:
    layout = call.where(input)
    if dim is None:
        raise Mixed
    if dim % input.ndim != layout.dim:
        return layout
    if not isinstance(repeats, int):
        raise Mixed
    return layout._replace(inner=layout.inner * repeats)


def _flip(call: Call, input: Tensor, *dims: Any, **named: Any) -> Layout:
    return _apart_from(call, input, *dims, *named.values())


def _apart_from(call: Call, input: Tensor, *dims: Any) -> Layout:
    """The layout is that of the input, whose samples must not lie along these."""
    layout = call.where(input)
    flat = [d for dim in dims for d in (dim if isinstance(dim, list | tuple) else (dim,))]
    if not flat or layout.dim in [d % input.ndim for d in flat]:
        raise Mixed
    return layout


def _fliplr(call: Call, input: Tensor) -> Layout:
    return _apart_from(call, input, 1)


def _flipud(call: Call, input: Tensor) -> Layout:
    return _apart_from(call, input, 0)


def _rot90(call: Call, input: Tensor, k: int = 1, dims: Any = (0, 1)) -> Layout:
    return _apart_from(call, input, dims)


def _roll(call: Call, input: Tensor, shifts: Any, dims: Any = None) -> Layout:
    return _apart_from(call, input, () if dims is None else dims)


_VIEWS = (
    *("permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis", "t", "T", "mT", "H", "mH", "adjoint"),
    *("narrow", "select", "unbind", "chunk", "split", "split_with_sizes", "tensor_split", "hsplit", "vsplit", "dsplit"),
    *("expand", "expand_as", "broadcast_to", "squeeze", "unsqueeze", "diagonal", "unfold"),
)
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
    **dict.fromkeys(functions("sum", "mean", "amax", "amin"), reduced),
    **dict.fromkeys(functions("median"), reduced),
    **dict.fromkeys(functions("kthvalue"), _kth),
    **dict.fromkeys(functions("sort", "cumsum"), _within),
    **dict.fromkeys(functions("topk"), _topk),
    **{
        function: _trailing(n)
        for n in (1, 2, 3)
        for name in ("avg_pool", "adaptive_avg_pool", "max_pool", "adaptive_max_pool", "fractional_max_pool")
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
