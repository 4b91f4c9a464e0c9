"""PyTorch's fused CPU kernels for attention. They have no second derivative, but return the log-sum-exp."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastgan import torch_private
from fastgan.ops.attention.layout import Options
from fastgan.ops.attention.reference import additive


def is_eligible(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float) -> bool:
    """Return whether the kernels take these operands without a copy of a large mask."""
    if not q.is_cpu or dropout_p > 0 or v.shape[-1] != q.shape[-1] or any(t.stride(-1) != 1 for t in (q, k, v)):
        return False
    if mask is None or mask.dtype == torch.bool:
        return mask is None or mask.numel() <= q.numel()
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
    o, lse = torch_private.attention_on_cpu(
        q, k, v, 0.0, options.is_causal, attn_mask=_additive(mask, q.dtype), scale=options.scale
    )
    return o, lse


def backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, o: Tensor, lse: Tensor, options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk and dv."""
    g = g if g.stride(-1) == 1 else g.contiguous()
    keys, values = (_for_each_head(t, q) for t in (k, v))
    dq, dk, dv = torch_private.attention_on_cpu_backward(
        g, q, keys, values, o, lse, 0.0, options.is_causal, attn_mask=_additive(mask, q.dtype), scale=options.scale
    )
    return dq, _by_group(dk, k), _by_group(dv, v)


def _for_each_head(t: Tensor, q: Tensor) -> Tensor:
    return t if t.shape[1] == q.shape[1] else t.repeat_interleave(q.shape[1] // t.shape[1], 1)


def _by_group(grad: Tensor, t: Tensor) -> Tensor:
    return grad if grad.shape[1] == t.shape[1] else grad.unflatten(1, (t.shape[1], -1)).sum(2)


def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return additive(mask, dtype) if mask is not None and mask.dtype == torch.bool else mask
