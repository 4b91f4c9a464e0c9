"""Minibatch discrimination in plain PyTorch, differentiable to any order. It holds every pair of samples at once."""

from __future__ import annotations

import torch
from torch import Tensor


def minibatch_discrimination(
    rows: Tensor, everyone: Tensor, first: int, segments: Tensor | None, exclude_self: bool
) -> Tensor:
    """Compare each of ``rows`` with all of ``everyone``; ``rows`` is the part of ``everyone`` from ``first`` on."""
    distance = (rows[:, None] - everyone[None]).abs().sum(-1)  # (rows, everyone, B)
    similarity = torch.exp(-distance)
    own = torch.arange(first, first + len(rows), device=rows.device)
    left_out = torch.zeros(similarity.shape[:2], dtype=torch.bool, device=rows.device)
    if exclude_self:
        left_out |= own[:, None] == torch.arange(len(everyone), device=rows.device)
    if segments is not None:
        left_out |= segments[own, None] != segments
    return similarity.masked_fill(left_out[..., None], 0).sum(1)
