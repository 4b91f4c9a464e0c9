"""PyTorch's fused CPU kernels for attention. They have no second derivative, but return the log-sum-exp."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastgan import torch_private
from fastgan.ops.attention.layout import Options
from fastgan.ops.attention.reference import additive
from fastgan.ops.library import accumulation_dtype

_LEAST_ROWS = 64  # rows per call with a large boolean mask; with fewer, the kernel is slower than the blocks


def is_eligible(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float) -> bool:
    """Return whether the kernels take these operands without a copy of a large mask."""
    if not q.is_cpu or dropout_p > 0 or v.shape[-1] != q.shape[-1] or any(t.stride(-1) != 1 for t in (q, k, v)):
        return False
    if mask is None or mask.dtype == torch.bool:
        return mask is None or _rows_at_once(q, k, mask) >= min(_LEAST_ROWS, q.shape[2])
    return mask.dtype == q.dtype and mask.stride(-1) == 1 and mask.shape[-1] == k.shape[-2]


def is_faster(q: Tensor, wanted: Sequence[bool]) -> bool:
    """Return whether the backward kernel beats the blocks for these gradients of q, k, v and the mask.

    It always computes the first three, and each thread takes whole heads. With half as many heads as threads, both
    take the same time.
    """
    return not wanted[3] and sum(wanted) > 1 and 2 * q.shape[0] * q.shape[1] > torch.get_num_threads()


def forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, options: Options) -> tuple[Tensor, Tensor]:
    """Return o and the log-sum-exp of each row. Both are 0 for a row without keys."""
    k, v = (_for_each_head(t, q) for t in (k, v))
    parts = [
        torch_private.attention_on_cpu(
            q[:, :, rows], k, v, 0.0, options.is_causal, attn_mask=of_mask, scale=options.scale
        )
        for rows, of_mask in _parts(q, k, mask)
    ]
    o, lse = parts[0] if len(parts) == 1 else (torch.cat(results, 2) for results in zip(*parts, strict=True))
    return o, lse


def backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, o: Tensor, lse: Tensor, options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk and dv."""
    g = g if g.stride(-1) == 1 else g.contiguous()
    keys, values = (_for_each_head(t, q) for t in (k, v))
    parts: list[Tensor] = []
    sums: list[Tensor] = []
    for rows, of_mask in _parts(q, k, mask):
        dq, *by_keys = torch_private.attention_on_cpu_backward(
            *(t[:, :, rows] for t in (g, q)),
            keys,
            values,
            *(t[:, :, rows] for t in (o, lse)),
            0.0,
            options.is_causal,
            attn_mask=of_mask,
            scale=options.scale,
        )
        parts.append(dq)
        if not sums:
            sums = by_keys
        else:
            acc = accumulation_dtype(q.dtype)
            sums = [total.to(acc).add_(t) for total, t in zip(sums, by_keys, strict=True)]
    dq = parts[0] if len(parts) == 1 else torch.cat(parts, 2)
    dk, dv = (_by_group(total.to(q.dtype), t) for total, t in zip(sums, (k, v), strict=True))
    return dq, dk, dv


def _rows_at_once(q: Tensor, k: Tensor, mask: Tensor) -> int:
    """Return how many rows of a boolean mask have an additive copy no larger than the queries and keys."""
    of_row = mask.numel() // mask.shape[2]
    return q.shape[2] if mask.shape[2] == 1 else min(q.shape[2], (q.numel() + k.numel()) // of_row)


def _parts(q: Tensor, k: Tensor, mask: Tensor | None) -> Iterator[tuple[slice, Tensor | None]]:
    """Yield parts of the rows, and the additive form of the mask for each."""
    if mask is None or mask.dtype != torch.bool:
        yield slice(None), mask
        return
    at_once = _rows_at_once(q, k, mask)
    for first in range(0, q.shape[2], at_once):
        rows = slice(first, first + at_once)
        yield rows, additive(mask if mask.shape[2] == 1 else mask[:, :, rows], q.dtype)


def _for_each_head(t: Tensor, q: Tensor) -> Tensor:
    return t if t.shape[1] == q.shape[1] else t.repeat_interleave(q.shape[1] // t.shape[1], 1)


def _by_group(grad: Tensor, t: Tensor) -> Tensor:
    return grad if grad.shape[1] == t.shape[1] else grad.unflatten(1, (t.shape[1], -1)).sum(2)
