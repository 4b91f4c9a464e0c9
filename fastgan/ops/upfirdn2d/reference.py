"""upfirdn2d in PyTorch: inserted zeros, padding, a convolution and slices. The specification and the fallback."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from fastgan.ops.library import accumulation_dtype, without_autocast
from fastgan.ops.upfirdn2d.plan import Pair, image_size, memory_format


def upfirdn2d(x: Tensor, taps: Tensor, up: Pair, down: Pair, start: Pair, size: Pair) -> Tensor:
    """Resample x (N, C, H, W) with the taps (h, w). ``size`` is the size of the result."""
    (n, c), (h, w), taps_size = x.shape[:2], image_size(x), image_size(taps)
    z = x.to(accumulation_dtype(x.dtype))
    if up != (1, 1):
        z = F.pad(z[:, :, :, None, :, None], (0, up[1] - 1, 0, 0, 0, up[0] - 1))  # (N, C, H, uy, W, ux)
    z = z.reshape(n, c, h * up[0], w * up[1])
    # The last element that a result reads. Negative numbers crop.
    bottom, right = (
        (size[i] - 1) * down[i] + taps_size[i] - start[i] - length for i, length in enumerate((h * up[0], w * up[1]))
    )
    edges = start[1], right, start[0], bottom
    z = F.pad(F.pad(z, [max(edge, 0) for edge in edges]), [min(edge, 0) for edge in edges])
    with without_autocast(x.device.type):
        y = F.conv2d(z, taps.to(z.device, z.dtype).expand(c, 1, *taps_size), groups=c)
    if down != (1, 1):
        y = y[..., :: down[0], :: down[1]]
    return y.to(x.dtype).contiguous(memory_format=memory_format(x))
