"""How a convolution slides over its input."""

from __future__ import annotations

from typing import NamedTuple


class Geometry(NamedTuple):
    """As ``aten::convolution`` takes it."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int
