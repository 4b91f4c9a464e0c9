"""grid_sample inside a penalty, as in an augmentation before the discriminator: forward to double backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F

from fastgan import ops
from fastgan.bench.case import BASELINE, Case, Make, Run

SHAPE = (16, 3, 128, 128)  # images


def _penalized(function: Callable[..., Tensor], device: torch.device, dtype: torch.dtype) -> Run:
    torch.manual_seed(0)  # the same operands for each variant
    x, dy, h = (torch.randn(SHAPE, dtype=dtype, device=device) for _ in range(3))
    turned = torch.eye(2, 3, dtype=dtype, device=device) + 0.2 * torch.randn(len(x), 2, 3, dtype=dtype, device=device)
    grid = F.affine_grid(turned, list(SHAPE), align_corners=False)
    for leaf in (x, dy):
        leaf.requires_grad_()

    def run() -> Sequence[Tensor]:
        y = function(x, grid, align_corners=False)
        (dx,) = torch.autograd.grad(y, x, dy, create_graph=True)
        return [y.detach(), dx.detach(), *torch.autograd.grad(dx, dy, h)]

    return run


def setup(device: torch.device, dtype: torch.dtype) -> dict[str, Make]:
    functions = {BASELINE: F.grid_sample, "fastgan": ops.grid_sample}
    return {name: partial(_penalized, function, device, dtype) for name, function in functions.items()}


CASES = [
    Case(
        name="grid_sample/affine/double_backward",
        op=None,
        dtype=torch.float32,
        device_types=("cpu",),  # on a GPU, too, the kernels are PyTorch's
        # Each of three passes reads an image and the grid, and writes an image.
        bytes=3 * (2 * prod(SHAPE) + 2 * prod(SHAPE) // SHAPE[1]) * torch.float32.itemsize,
        operations=3 * 8 * prod(SHAPE),  # four products and sums an element
        tolerance=2e-4,
        setup=setup,
    )
]
