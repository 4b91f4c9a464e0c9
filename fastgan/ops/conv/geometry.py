"""The geometry of a convolution: stride, padding, dilation and groups."""

from __future__ import annotations

from typing import Any, NamedTuple


class Geometry(NamedTuple):
    """The arguments of ``aten::convolution``, and whether fastgan's kernels are allowed."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int
    kernels_allowed: bool  # whether the backend of the forward permits fastgan's kernels

    @property
    def arguments(self) -> tuple[Any, ...]:
        return self[:-1]
