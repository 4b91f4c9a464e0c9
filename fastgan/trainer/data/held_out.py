"""Real samples that the discriminator never trains on: what it says about them shows what it learned by heart."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgan.trainer.data.drawn import Source
from fastgan.trainer.data.sources import Images

SHARE = 0.1
MOST = 1024


def hold_out(source: Source, batch_size: int, seed: int) -> Source | None:
    """Take a tenth of a finite source's samples, 1024 at most, out of it; only before the first batch is drawn.

    Of an endless source, another stream is as unseen as it gets. None where a batch would no longer be filled.
    """
    if not isinstance(source, Images):
        return source.fork(seed)
    count = min(int(SHARE * source.size), MOST)
    return source.split(count, seed) if count and source.size - count >= batch_size else None


def some_reals(source: Source, count: int, seed: int) -> tuple[Tensor, Tensor | None]:
    """`count` samples that `seed` chooses, and their labels; all of them in turn where there are fewer."""
    drawn, labels = source.fork(seed).next_labelled(count if source.size is None else min(count, source.size))
    index = torch.arange(count, device=drawn.device) % len(drawn)
    return drawn[index], None if labels is None else labels[index]
