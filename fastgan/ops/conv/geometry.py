"""The geometry of a convolution: stride, padding, dilation and groups."""

from __future__ import annotations

from collections.abc import Sequence
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

    def of_input_gradient(self, input: Sequence[int], output: Sequence[int], kernel: Sequence[int]) -> Geometry | None:
        """Return the convolution that maps the gradient of the output to that of the input, both of these sizes.

        None: there is none, or a size that decides is symbolic.
        """
        if self.transposed:
            if any(beyond >= s for beyond, s in zip(self.output_padding, self.stride, strict=True)):
                return None  # it would be larger than the input
            return self._replace(transposed=False, output_padding=(0,) * len(self.stride))
        beyond = []
        for n, m, k, s, p, d in zip(input, output, kernel, self.stride, self.padding, self.dilation, strict=True):
            if s > 1 and not (isinstance(n, int) and isinstance(m, int)):
                return None
            beyond.append(0 if s == 1 else n - ((m - 1) * s - 2 * p + d * (k - 1) + 1))
        return self._replace(transposed=True, output_padding=tuple(beyond))
