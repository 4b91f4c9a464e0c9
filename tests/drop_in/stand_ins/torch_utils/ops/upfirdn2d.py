"""Slow code under the signatures of the StyleGAN family, with one function that is not replaced."""

import torch
from torch.nn import functional as F


def setup_filter(taps):
    taps = torch.as_tensor(taps, dtype=torch.float32)
    return torch.outer(taps, taps) / taps.sum() ** 2


def _four(padding):
    padding = [padding] * 2 if isinstance(padding, int) else list(padding)
    return padding if len(padding) == 4 else [padding[0], padding[0], padding[1], padding[1]]


def _pair(value):
    return [value, value] if isinstance(value, int) else list(value)


def upfirdn2d(x, f, up=1, down=1, padding=0, flip_filter=False, gain=1, impl="cuda"):
    (ux, uy), (dx, dy), (n, c, h, w) = _pair(up), _pair(down), x.shape
    z = x.new_zeros(n, c, h * uy, w * ux)
    z[:, :, ::uy, ::ux] = x
    z = F.pad(z, _four(padding))
    f = x.new_ones(1, 1) if f is None else f
    f = (f if f.ndim == 2 else f[:, None] * f).to(x.dtype) * gain
    f = f if flip_filter else f.flip((0, 1))
    return F.conv2d(z, f.expand(c, 1, *f.shape), groups=c)[:, :, ::dy, ::dx]


def filter2d(x, f, padding=0, flip_filter=False, gain=1, impl="cuda"):
    h, w = f.shape[0], f.shape[-1]
    around = [w // 2, (w - 1) // 2, h // 2, (h - 1) // 2]
    return upfirdn2d(x, f, 1, 1, [p + q for p, q in zip(_four(padding), around, strict=True)], flip_filter, gain)


def upsample2d(x, f, up=2, padding=0, flip_filter=False, gain=1, impl="cuda"):
    (ux, uy), h, w = _pair(up), f.shape[0], f.shape[-1]
    around = [(w + ux - 1) // 2, (w - ux) // 2, (h + uy - 1) // 2, (h - uy) // 2]
    around = [p + q for p, q in zip(_four(padding), around, strict=True)]
    return upfirdn2d(x, f, up, 1, around, flip_filter, gain * ux * uy)


def downsample2d(x, f, down=2, padding=0, flip_filter=False, gain=1, impl="cuda"):
    (dx, dy), h, w = _pair(down), f.shape[0], f.shape[-1]
    around = [(w - dx + 1) // 2, (w - dx) // 2, (h - dy + 1) // 2, (h - dy) // 2]
    return upfirdn2d(x, f, 1, down, [p + q for p, q in zip(_four(padding), around, strict=True)], flip_filter, gain)
