"""Filters, calls and the definition of upfirdn2d for its tests."""

from __future__ import annotations

import torch

FILTERS = {
    "1-D": torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8,
    "rank one": torch.outer(torch.tensor([1.0, 3.0, 3.0, 1.0]), torch.tensor([1.0, 2.0, 1.0])) / 32,
    "plane": torch.tensor([[1.0, -2.0, 0.5], [0.25, 3.0, 1.0]]),
    "long": torch.arange(1.0, 13.0) / 64,
    "none": None,
}
CALLS = {
    "plain": {},
    "up": dict(up=2, padding=(2, 1, 2, 1), gain=4),
    "down": dict(down=2, padding=1),
    "pairs": dict(up=(2, 1), down=(1, 2), padding=(3, 4)),
    "both": dict(up=3, down=2, padding=(4, 3, 2, 5), flip_filter=True),
    "crop": dict(padding=(-1, 2, 3, -2), flip_filter=True),
    "far": dict(down=4, padding=9),
}


def _places(size, up, down, start, taps, results):
    """(results, taps, size): 1 where the element meets the tap in that result."""
    o, k, i = torch.arange(results)[:, None, None], torch.arange(taps)[:, None], torch.arange(size)
    return (o * down + k - start == up * i).double()


def defined(x, f, up=1, down=1, padding=0, flip_filter=False, gain=1.0):
    """The definition as one sum over all elements and taps."""
    pair = lambda v: v if isinstance(v, tuple) else (v, v)  # noqa: E731
    (ux, uy), (dx, dy), padding = pair(up), pair(down), pair(padding)
    left, right, top, bottom = padding if len(padding) == 4 else (padding[0], padding[0], padding[1], padding[1])
    f = torch.ones(1, 1) if f is None else f[:, None] * f if f.ndim == 1 else f
    f = f.to(x.device, torch.float64)
    f = f if flip_filter else f.flip((0, 1))
    rows = (x.shape[2] * uy + top + bottom - f.shape[0]) // dy + 1
    columns = (x.shape[3] * ux + left + right - f.shape[1]) // dx + 1
    vertical = _places(x.shape[2], uy, dy, top, f.shape[0], rows).to(x.device)
    horizontal = _places(x.shape[3], ux, dx, left, f.shape[1], columns).to(x.device)
    return gain * torch.einsum("nchw,xbw,ab,yah->ncyx", x, horizontal, f, vertical)  # in this order


def orders(function, x, by):
    """Return the values, the gradient of the sum of their cubes, and the gradient of its squares."""
    x = x.detach().requires_grad_()
    y = function(x)
    (grad,) = torch.autograd.grad((y.pow(3) * by).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), x)
    return y, grad, second
