"""How an input is seen by the kernels, and what their sums are kept in."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Layout(NamedTuple):
    """A contiguous input as (rows, channels, inner): one mean and one variance a row.

    Channel c of row r has the weight and bias of index ``r % groups * channels + c``.
    """

    rows: int
    channels: int
    inner: int
    groups: int


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
