"""R1 through one convolution, forward to double backward, for convolutions that have a kernel in fastgan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F

from fastgan import ops
from fastgan.bench.case import BASELINE, Case, Make, Run

Shape = tuple[int, ...]

# name -> input, weight, stride, padding; the groups follow from the channels
CONVOLUTIONS: dict[str, tuple[Shape, Shape, int, int]] = {
    "rgb-64-4x4": ((32, 3, 64, 64), (32, 3, 4, 4), 2, 1),  # first layer of a critic: few input channels
    "rgb-128-3x3": ((8, 3, 128, 128), (64, 3, 3, 3), 1, 1),
    "strided-64-4x4": ((8, 64, 64, 64), (128, 64, 4, 4), 2, 1),  # second layer of a critic for 128 px
    "strided-8-4x4": ((32, 256, 8, 8), (512, 256, 4, 4), 2, 1),  # its last layer: mostly weights
    "strided-256-4x4": ((4, 32, 256, 256), (64, 32, 4, 4), 2, 1),  # a layer for 512 px
    "expand-32-1x1": ((8, 32, 32, 32), (64, 32, 1, 1), 1, 0),  # outer layers of a bottleneck: 1x1
    "project-32-1x1": ((8, 64, 32, 32), (32, 64, 1, 1), 1, 0),
    "skip-8-1x1": ((16, 256, 8, 8), (512, 256, 1, 1), 1, 0),
    "wave-4096-41": ((4, 128, 4096), (256, 8, 41), 2, 20),  # HiFi-GAN's scales: wide kernels, 16 groups
    "wave-8192-15": ((8, 1, 8192), (64, 1, 15), 1, 7),  # their first layer
}
CONV_OF: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    name: (F.conv1d, ops.conv1d) if len(shape) == 3 else (F.conv2d, ops.conv2d)
    for name, (shape, *_) in CONVOLUTIONS.items()
}


def r1(name: str, device: torch.device, dtype: torch.dtype) -> dict[str, Make]:
    shape, kernel, stride, padding = CONVOLUTIONS[name]
    x, weight = torch.randn(shape, dtype=dtype, device=device), torch.randn(kernel, dtype=dtype, device=device)
    weight /= prod(kernel[1:]) ** 0.5
    groups = shape[1] // kernel[1]
    pytorchs, fastgans = CONV_OF[name]
    by_logits = torch.randn_like(pytorchs(x, weight, None, stride, padding, 1, groups))

    def variant(conv: Callable[..., Tensor]) -> Run:
        inputs = [t.clone().requires_grad_() for t in (x, weight, by_logits)]

        def run() -> Sequence[Tensor]:
            y = conv(inputs[0], inputs[1], None, stride, padding, 1, groups)
            (grad,) = torch.autograd.grad(y, inputs[0], inputs[2], create_graph=True)
            return torch.autograd.grad(grad.square().sum(), inputs[1:])

        return run

    return {BASELINE: partial(variant, pytorchs), "fastgan": partial(variant, fastgans)}


def _case(name: str) -> Case:
    shape, kernel, stride, padding = CONVOLUTIONS[name]
    sides = ((size + 2 * padding - k) // stride + 1 for size, k in zip(shape[2:], kernel[2:], strict=True))
    inputs, outputs = prod(shape), shape[0] * kernel[0] * prod(sides)
    dtype = torch.float32
    return Case(
        name=f"conv/{name}/r1",
        op=None,
        dtype=dtype,
        device_types=("cpu",),  # on a GPU every convolution is the vendor library's
        # Forward: x to y. Backward: dy to dx. The penalty: dx to h. Double backward: h to by_dy, h and dy to by_weight.
        bytes=(6 * inputs + 4 * outputs + 4 * prod(kernel)) * dtype.itemsize,
        operations=4 * 2 * outputs * prod(kernel[1:]) + 4 * inputs,
        tolerance=2e-4,
        setup=partial(r1, name),
    )


CASES = [_case(name) for name in CONVOLUTIONS]
