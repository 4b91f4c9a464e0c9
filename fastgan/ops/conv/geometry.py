"""How a convolution slides over its input."""

from __future__ import annotations

from typing import Any, NamedTuple


class Geometry(NamedTuple):
    """As ``aten::convolution`` takes it, but for the last."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int
    ours: bool  # whether the forward's backend lets another way than the vendor's be taken

    @property
    def arguments(self) -> tuple[Any, ...]:
        return self[:-1]
