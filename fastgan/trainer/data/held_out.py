"""Real samples that the discriminator never trains on. Its logits for them show how much it memorized."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgan.trainer.data.drawn import Source
from fastgan.trainer.data.sources import Images

SHARE = 0.1
MOST = 1024


def hold_out(source: Source, batch_size: int, seed: int) -> Source | None:
    """Remove a tenth of a finite source's samples, at most 1024, and return them. Call this before the first batch.

    For an endless source, return another stream. Return None if too few samples would be left for a batch.
    """
    if not isinstance(source, Images):
        return source.fork(seed)
    count = min(int(SHARE * source.size), MOST)
    return source.split(count, seed) if count and source.size - count >= batch_size else None


def some_reals(source: Source, count: int, seed: int) -> tuple[Tensor, Tensor | None]:
    """Return `count` samples chosen by `seed`, and their labels. If the source has fewer, they repeat."""
    drawn, labels = source.fork(seed).next_labeled(count if source.size is None else min(count, source.size))
    index = torch.arange(count, device=drawn.device) % len(drawn)
    return drawn[index], None if labels is None else labels[index]
