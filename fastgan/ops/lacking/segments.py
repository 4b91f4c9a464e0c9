"""Reductions of groups of rows: embedding bags with per-sample weights, and segment_reduce."""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastgan.ops.lacking.empty import constant_in


def embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    """``F.embedding_bag``. If per_sample_weights require a gradient, PyTorch operations compute the weighted sums."""
    options = mode, sparse, per_sample_weights, include_last_offset, padding_idx
    pytorchs: Callable[..., Tensor] = F.embedding_bag
    if per_sample_weights is None or not per_sample_weights.requires_grad:
        return pytorchs(input, weight, offsets, max_norm, norm_type, scale_grad_by_freq, *options)
    with torch.no_grad():  # raises PyTorch's own errors
        value = pytorchs(input, weight, offsets, max_norm, norm_type, scale_grad_by_freq, *options)
    rows = F.embedding(input.reshape(-1), weight, sparse=sparse)  # (L, D); the call above has applied max_norm
    factors = per_sample_weights.reshape(-1)
    if padding_idx is not None:
        factors = factors.masked_fill(input.reshape(-1) == padding_idx % len(weight), 0)
    rows = rows * factors.unsqueeze(-1)
    if input.ndim == 2:
        return rows.view(*input.shape, weight.shape[1]).sum(1)
    assert offsets is not None
    starts = offsets[:-1] if include_last_offset else offsets
    bags = torch.searchsorted(starts.contiguous(), torch.arange(len(input), device=input.device), right=True) - 1
    return torch.zeros_like(value).index_add(0, bags, rows)


def segment_reduce(
    data: Tensor,
    reduce: str,
    *,
    lengths: Tensor | None = None,
    indices: Tensor | None = None,
    offsets: Tensor | None = None,
    axis: int = 0,
    unsafe: bool = False,
    initial: float | None = None,
) -> Tensor:
    """``torch.segment_reduce``. Batch dimensions before the axis have segments of their own."""
    options = {"lengths": lengths, "indices": indices, "offsets": offsets, "axis": axis, "unsafe": unsafe}
    bounds = lengths if lengths is not None else offsets
    if not data.requires_grad or bounds is None or bounds.ndim != axis + 1:
        return torch.segment_reduce(data, reduce, initial=initial, **options)  # type: ignore[arg-type]
    if data.numel() == 0:
        value = torch.segment_reduce(data.detach(), reduce, initial=initial, **options)  # type: ignore[arg-type]
        return constant_in(value, data)
    with torch.no_grad():  # raises PyTorch's own errors
        value = torch.segment_reduce(data, reduce, initial=initial, **options)  # type: ignore[arg-type]
    sizes = lengths if lengths is not None else bounds.diff()
    if axis and (sizes.sum(-1) != data.shape[axis]).any():  # with ``unsafe``: rows outside of all segments
        return torch.segment_reduce(data, reduce, initial=initial, **options)  # type: ignore[arg-type]
    reduced = _of_rows(data.flatten(0, axis), reduce, sizes.flatten(), value.flatten(0, axis), initial)
    return reduced.view(value.shape)


def _of_rows(data: Tensor, reduce: str, sizes: Tensor, value: Tensor, initial: float | None) -> Tensor:
    segment = torch.repeat_interleave(torch.arange(len(sizes), device=data.device), sizes)
    data = data[: len(segment)]
    if reduce in ("sum", "mean"):
        start = 0.0 if initial is None or initial == -inf else initial
        sums = torch.full_like(value, start).index_add(0, segment, data)
        if reduce == "sum":
            return sums
        return torch.where(value.isfinite(), sums / sizes.view(-1, *[1] * (data.ndim - 1)).clamp(min=1), value)
    return _padded(data, reduce, sizes, segment, value, initial)


def _padded(data: Tensor, reduce: str, sizes: Tensor, segment: Tensor, value: Tensor, initial: float | None) -> Tensor:
    """Pad the segments to one length with the neutral element, and reduce them."""
    fill = {"max": -inf, "min": inf, "prod": 1.0}[reduce]
    position = torch.arange(len(data), device=data.device) - (sizes.cumsum(0) - sizes)[segment]
    longest = int(sizes.max())
    start = data.new_full((len(sizes), 1, *data.shape[1:]), fill if initial is None else initial)
    rows = data.new_full((len(sizes), longest, *data.shape[1:]), fill).index_put((segment, position), data)
    rows = torch.cat([start, rows], 1)  # (S, 1 + longest, ...)
    if reduce == "prod":
        return rows.prod(1)
    return rows.amax(1) if reduce == "max" else rows.amin(1)


ROUTES: dict[Any, Callable[..., Any]] = {F.embedding_bag: embedding_bag, torch.segment_reduce: segment_reduce}
