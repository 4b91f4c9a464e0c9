"""Insert zeros, pad, filter and keep every n-th element, one step after another."""

import torch
from torch import Tensor
from torch.nn import functional as F


def setup_filter(taps: list[float]) -> Tensor:
    """A two-dimensional filter with a sum of 1, from the taps of one dimension."""
    f = torch.tensor(taps)
    return torch.outer(f, f) / f.sum() ** 2


def upfirdn2d(x, f, up=1, down=1, padding=0, flip_filter=False, gain=1):
    n, c, h, w = x.shape
    left, right, top, bottom = [padding] * 4 if isinstance(padding, int) else padding
    x = F.pad(x[:, :, :, None, :, None], [0, up - 1, 0, 0, 0, up - 1]).reshape(n, c, h * up, w * up)
    x = F.pad(x, [left, right, top, bottom])
    f = (f if flip_filter else f.flip([0, 1])) * gain
    return F.conv2d(x, f.to(x.dtype).expand(c, 1, *f.shape), groups=c)[:, :, ::down, ::down]


def upsample2d(x, f, up=2):
    before, after = (len(f) + up - 1) // 2, (len(f) - up) // 2
    return upfirdn2d(x, f, up=up, padding=[before, after, before, after], gain=up**2)


def downsample2d(x, f, down=2):
    before, after = (len(f) - down + 1) // 2, (len(f) - down) // 2
    return upfirdn2d(x, f, down=down, padding=[before, after, before, after])
