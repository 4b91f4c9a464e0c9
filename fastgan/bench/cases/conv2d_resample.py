"""A filtered up- or downsampling convolution inside a penalty: forward, backward and double backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F

from fastgan import backends, ops
from fastgan.bench.case import BASELINE, BY_NAME, Case, Make, Run, on_backend
from fastgan.bench.filtered import TAPS, resample

SHAPE = (8, 64, 64, 64)  # a layer of StyleGAN2 at 64 px
KERNEL = (64, 64, 3, 3)
_Function = Callable[[Tensor, Tensor, Tensor], Tensor]  # of an image, a weight and taps


def _down(x: Tensor, weight: Tensor, f: Tensor) -> Tensor:
    return F.conv2d(resample(x, f, padding=(2, 2, 2, 2)), weight, stride=2)


def _up(x: Tensor, weight: Tensor, f: Tensor) -> Tensor:
    y = F.conv_transpose2d(x, weight.transpose(0, 1).flip((2, 3)), stride=2)
    return resample(y, f, padding=(1, 1, 1, 1), gain=4.0)


_PLAIN: dict[str, _Function] = {"down": _down, "up": _up}


def _penalized(function: _Function, device: torch.device, dtype: torch.dtype) -> Run:
    torch.manual_seed(0)  # the same operands for each variant
    x, weight, h = (torch.randn(shape, dtype=dtype, device=device) for shape in (SHAPE, KERNEL, SHAPE))
    f = torch.tensor(TAPS, dtype=dtype, device=device) / sum(TAPS)
    weight /= prod(KERNEL[1:]) ** 0.5
    dy = torch.randn_like(function(x, weight, f))
    for leaf in (x, weight, dy):
        leaf.requires_grad_()

    def run() -> Sequence[Tensor]:
        y = function(x, weight, f)
        (dx,) = torch.autograd.grad(y, x, dy, create_graph=True)
        return [y.detach(), dx.detach(), *torch.autograd.grad(dx, (dy, weight), h)]

    return run


def setup(name: str, device: torch.device, dtype: torch.dtype) -> dict[str, Make]:
    def fast(x: Tensor, weight: Tensor, f: Tensor) -> Tensor:
        up, down = (2, 1) if name == "up" else (1, 2)
        return ops.conv2d_resample(x, weight, f, up=up, down=down, padding=1)

    def variant(backend: str) -> Run:
        return on_backend(backend, _penalized(fast, device, dtype))

    variants: dict[str, Make] = {
        BASELINE: partial(_penalized, _PLAIN[name], device, dtype),
        "reference": partial(variant, "reference"),
        "fastgan": partial(_penalized, fast, device, dtype),
    }
    if device.type == "cuda":
        for backend in BY_NAME:
            if backends.why_not("upfirdn2d", backend, device.type, dtype) is None:
                variants[backend] = partial(variant, backend)
    return variants


def _case(name: str) -> Case:
    pixels, dtype = prod(SHAPE[2:]), torch.float32
    lower = pixels // 4 if name == "down" else pixels  # where the convolution runs
    images, results = prod(SHAPE), SHAPE[0] * KERNEL[0] * (pixels // 4 if name == "down" else 4 * pixels)
    return Case(
        name=f"conv2d_resample/{name}/double_backward",
        op="upfirdn2d",
        dtype=dtype,
        device_types=("cpu", "cuda"),
        # x to y, dy to dx, h and dy to two gradients. Each reads the weight, and the last one writes its gradient.
        bytes=(3 * images + 4 * results + 4 * prod(KERNEL)) * dtype.itemsize,
        operations=4 * 2 * SHAPE[0] * lower * prod(KERNEL),
        tolerance=2e-4,
        setup=partial(setup, name),
    )


CASES = [_case(name) for name in _PLAIN]
