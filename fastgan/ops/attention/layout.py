"""The options of an attention call, and the partition of its heads into blocks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 2**19  # scores held at a time, for two threads or fewer
_MOST_AT_ONCE = 8  # heads; each takes half a BLOCK
_LEAST_ROWS = 64
# Scores of a call up to which a CPU runs the plain formulas if a gradient is needed. They keep at most 13 matrices of
# scores, 27 MB in float32. Up to here they are as fast as PyTorch's kernel, and faster than blocks to second order.
FEW = 2**19
_FAR = 1024.0


class Options(NamedTuple):
    scale: float
    is_causal: bool
    dropout_p: float


class Heads(NamedTuple):
    """A set of heads: all heads of several samples, or some heads of one sample."""

    samples: slice
    heads: slice
    groups: slice  # groups of keys and values
    repeats: int  # heads that share a group

    def queries(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        return t[self.samples, self.heads].to(dtype).flatten(0, 1)  # (heads, L, E)

    def keys(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        t = t[self.samples, self.groups].to(dtype)
        if self.repeats > 1:
            t = t.repeat_interleave(self.repeats, 1)
        return t.flatten(0, 1)  # (heads, S, E)

    def put_queries(self, target: Tensor, values: Tensor | None, rows: slice) -> None:
        """Write values into the rows of ``target``. None: write zeros."""
        target = target[self.samples, self.heads, rows]
        _ = target.zero_() if values is None else target.copy_(values.view(target.shape))

    def put_keys(self, target: Tensor, values: Tensor) -> None:
        target = target[self.samples, self.groups]
        by_group = values.view(*target.shape[:2], self.repeats, *target.shape[2:])
        target.copy_(by_group.sum(2) if self.repeats > 1 else by_group[:, :, 0])

    def by_sample(self, scores: Tensor) -> Tensor:
        """View (heads, rows, columns) as (samples, heads of each, rows, columns)."""
        return scores.view(self.samples.stop - self.samples.start, -1, *scores.shape[1:])

    def of_mask(self, mask: Tensor, rows: slice, columns: int) -> Tensor:
        """Return the part of a (B, H, L, S) mask for these heads. Any size of the mask may be 1."""
        wanted = self.samples, self.heads, rows, slice(columns)
        return mask[tuple(slice(None) if size == 1 else at for size, at in zip(mask.shape, wanted, strict=True))]


def partition(q: Tensor, k: Tensor, threads: int = 2) -> tuple[list[Heads], int]:
    """Return the sets of heads that are computed together, and the number of rows per block.

    A set has a head for each thread if there are as many. A matrix product that threads share takes up to twice the
    processor time.
    """
    (batch, heads, length, _), (groups, keys) = q.shape, k.shape[1:3]
    repeats = heads // groups
    at_once = min(threads, _MOST_AT_ONCE)
    scores = BLOCK * max(1, at_once // 2)
    together = max(1, scores // max(1, length * keys * repeats), -(-at_once // repeats))  # groups
    samples = min(max(1, together // groups), batch)
    together = min(together, groups)
    parts = [
        Heads(
            slice(b, min(b + samples, batch)),
            slice(g * repeats, min(g + together, groups) * repeats),
            slice(g, min(g + together, groups)),
            repeats,
        )
        for b in range(0, batch, samples)
        for g in range(0, groups, together)
    ]
    of_part = samples * together * repeats
    rows = max(scores // max(1, keys * of_part), _LEAST_ROWS // of_part, 1)
    return parts, min(rows, max(1, length))


def is_far(lse: Tensor) -> bool:
    """Return whether a log-sum-exp is so large that its rounding changes the probabilities computed from it.

    A mask that adds -1e9 to a whole row leaves no digits for the logarithm of the sum.
    """
    return bool((lse.abs() > _FAR).any())
