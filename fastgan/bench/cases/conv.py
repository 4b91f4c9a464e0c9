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

# name -> input, weight, stride, padding
CONVOLUTIONS: dict[str, tuple[Shape, Shape, int, int]] = {
    "rgb-64-4x4": ((32, 3, 64, 64), (32, 3, 4, 4), 2, 1),  # first layer of a critic: few input channels
    "rgb-128-3x3": ((8, 3, 128, 128), (64, 3, 3, 3), 1, 1),
    "strided-64-4x4": ((8, 64, 64, 64), (128, 64, 4, 4), 2, 1),  # second layer of a critic for 128 px
    "strided-8-4x4": ((32, 256, 8, 8), (512, 256, 4, 4), 2, 1),  # its last layer: mostly weights
    "strided-256-4x4": ((4, 32, 256, 256), (64, 32, 4, 4), 2, 1),  # a layer for 512 px
    "expand-32-1x1": ((8, 32, 32, 32), (64, 32, 1, 1), 1, 0),  # outer layers of a bottleneck: 1x1
    "project-32-1x1": ((8, 64, 32, 32), (32, 64, 1, 1), 1, 0),
    "skip-8-1x1": ((16, 256, 8, 8), (512, 256, 1, 1), 1, 0),
}


def r1(name: str, device: torch.device, dtype: torch.dtype) -> dict[str, Make]:
    shape, kernel, stride, padding = CONVOLUTIONS[name]
    x, weight = torch.randn(shape, dtype=dtype, device=device), torch.randn(kernel, dtype=dtype, device=device)
    weight /= prod(kernel[1:]) ** 0.5
    by_logits = torch.randn_like(F.conv2d(x, weight, None, stride, padding))

    def variant(conv: Callable[..., Tensor]) -> Run:
        inputs = [t.clone().requires_grad_() for t in (x, weight, by_logits)]

        def run() -> Sequence[Tensor]:
            y = conv(inputs[0], inputs[1], None, stride, padding)
            (grad,) = torch.autograd.grad(y, inputs[0], inputs[2], create_graph=True)
            return torch.autograd.grad(grad.square().sum(), inputs[1:])

        return run

    return {BASELINE: partial(variant, F.conv2d), "fastgan": partial(variant, ops.conv2d)}


def _case(name: str) -> Case:
    (n, _, height, width), kernel, stride, padding = CONVOLUTIONS[name]
    inputs = prod(CONVOLUTIONS[name][0])
    side = (height + 2 * padding - kernel[2]) // stride + 1
    outputs = n * kernel[0] * side * ((width + 2 * padding - kernel[3]) // stride + 1)
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
