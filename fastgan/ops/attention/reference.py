"""Scaled dot product attention in elementary PyTorch operations: the reference, fallback and benchmark baseline."""

from __future__ import annotations

from math import inf

import torch
from torch import Tensor

from fastgan import torch_private
from fastgan.ops.library import accumulation_dtype


def additive(kept: Tensor, dtype: torch.dtype) -> Tensor:
    """Return 0 where a boolean mask is True and -inf elsewhere."""
    zero, never = (torch.full((), value, dtype=dtype, device=kept.device) for value in (0, -inf))
    return torch.where(kept, zero, never)


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, is_causal: bool, dropout_p: float
) -> Tensor:
    """Compute attention of q (B, H, L, E), k (B, G, S, E) and v (B, G, S, Ev), with H a multiple of G.

    The mask is boolean or additive, (B, H, L, S).
    """
    acc = accumulation_dtype(q.dtype)
    repeats = q.shape[1] // k.shape[1] if k.shape[1] else 1
    if repeats > 1:
        k, v = (t.repeat_interleave(repeats, 1) for t in (k, v))
    scores = (q.to(acc) * scale) @ k.to(acc).transpose(-1, -2)  # (B, H, L, S)
    if is_causal:
        kept = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        scores = scores + additive(kept, acc)
    elif mask is not None:
        scores = scores + (additive(mask, acc) if mask.dtype == torch.bool else mask)
    # A row whose keys are all masked gives 0, and its gradients are 0, as in PyTorch.
    probabilities = torch_private.safe_softmax(scores, -1) if mask is not None else scores.softmax(-1)
    if dropout_p > 0:
        probabilities = torch.dropout(probabilities, dropout_p, True)
    return (probabilities @ v.to(acc)).to(q.dtype)
