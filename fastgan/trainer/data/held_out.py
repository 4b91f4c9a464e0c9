"""Real samples that the discriminator never trains on. Its logits for them show how much it memorized."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from fastgan.trainer.data.drawn import Source
from fastgan.trainer.data.sources import Images
from fastgan.trainer.errors import DataError

SHARE = 0.1
MOST = 1024


def hold_out(source: Source, batch_size: int, seed: int, names: Iterable[str] = ()) -> Source | None:
    """Remove a tenth of a finite source's samples, at most 1024, and return them. Call this before the first batch.

    For an endless source, return another stream. Return None if too few samples would be left for a batch. With
    `names`, those pictures are held out, whatever their number.
    """
    if not isinstance(source, Images):
        return source.fork(seed)
    there = set(source.member_names()).intersection(names)
    if there and source.size - len(there) >= batch_size:
        return source.split_names(there, seed)
    count = min(int(SHARE * source.size), MOST)
    return source.split(count, seed) if count and source.size - count >= batch_size else None


def require_batch(source: Source, batch_size: int) -> None:
    """Raise DataError if a source has too few samples for a batch."""
    if source.size is not None and source.size < batch_size:
        raise DataError(
            f"a batch of {batch_size} needs at least as many pictures, but the data has {source.size}: "
            f"set --batch-size to {source.size} or less"
        )


def sample_reals(source: Source, count: int, seed: int) -> tuple[Tensor, Tensor | None]:
    """Return `count` samples chosen by `seed`, and their labels. If the source has fewer, they repeat."""
    drawn, labels = source.fork(seed).next_labeled(count if source.size is None else min(count, source.size))
    index = torch.arange(count, device=drawn.device) % len(drawn)
    return drawn[index], None if labels is None else labels[index]
