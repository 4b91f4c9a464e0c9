"""upfirdn2d in PyTorch's convolutions with a stride, where no kernel can run, as on a CPU without a compiled module.

A convolution with stride ``down`` computes only the elements that are kept. A transposed convolution with stride ``up``
multiplies no inserted zeros. The reference does both.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from fastgan.ops.library import accumulation_dtype, without_autocast
from fastgan.ops.upfirdn2d import reference
from fastgan.ops.upfirdn2d.plan import Pair, memory_format

ONE = (1, 1)


def upfirdn2d(x: Tensor, taps: Tensor, up: Pair, down: Pair, start: Pair, size: Pair) -> Tensor:
    """Compute the result of the reference, which runs if ``up`` and ``down`` are both above 1."""
    if up != ONE and down != ONE:
        return reference.upfirdn2d(x, taps, up, down, start, size)
    c, taps_size = x.shape[1], taps.shape
    z = x.to(accumulation_dtype(x.dtype))
    taps = taps.to(z.device, z.dtype).expand(c, 1, *taps_size)
    with without_autocast(x.device.type):
        if up == ONE:
            read = [(size[i] - 1) * down[i] + taps_size[i] for i in (0, 1)]
            y = F.conv2d(_window(z, start, read), taps, stride=down, groups=c)
        else:
            y = F.conv_transpose2d(z, taps.flip((2, 3)), stride=up, groups=c)
            # Its element 0 is the first one that the image's first element meets, with the filter's last tap.
            y = _window(y, [start[i] - taps_size[i] + 1 for i in (0, 1)], size)
    return y.to(x.dtype).contiguous(memory_format=memory_format(x))


def _window(z: Tensor, before: list[int] | Pair, size: list[int] | Pair) -> Tensor:
    """Return the elements from -``before`` on. There are zeros around the image."""
    edges = []
    for i in (1, 0):
        edges += [before[i], size[i] - before[i] - z.shape[2 + i]]
    if max(edges) > 0:
        z = F.pad(z, [max(edge, 0) for edge in edges])
    top, left = (max(-b, 0) for b in before)
    return z[:, :, top : top + size[0], left : left + size[1]]
