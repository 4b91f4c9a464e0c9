"""Spectral normalization of all layers of a discriminator: forward, and forward + backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from fastgan import backends
from fastgan import nn as fnn
from fastgan.bench.case import BASELINE, BY_NAME, Case, Make, Run, on_backend

Shape = tuple[int, ...]

# SNGAN's discriminator for 128 px; a small one for 64 px; the first one with three more convolutions.
SNGAN128: tuple[Shape, ...] = (
    (64, 3, 3, 3),
    (64, 64, 3, 3),
    (128, 64, 3, 3),
    (128, 128, 3, 3),
    (256, 128, 3, 3),
    (256, 256, 3, 3),
    (512, 256, 3, 3),
    (512, 512, 3, 3),
    (1024, 512, 3, 3),
    (1024, 1024, 3, 3),
    (1, 1024),
)
SMALL: tuple[Shape, ...] = (
    (32, 3, 4, 4),
    (64, 32, 4, 4),
    (128, 64, 4, 4),
    (64, 128, 3, 3),
    (64, 64, 3, 3),
    (1, 4096),
)
LARGE: tuple[Shape, ...] = (*SNGAN128, (128, 128, 3, 3), (256, 256, 3, 3), (1024, 1024, 3, 3))


class _Layers(nn.Module):
    """Its forward returns each layer's weight, as a discriminator's forward computes them."""

    def __init__(self, shapes: Sequence[Shape]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_layer(shape) for shape in shapes)

    def forward(self) -> list[Tensor]:
        return [layer.weight for layer in self.layers]  # type: ignore[misc]


def _layer(shape: Shape) -> nn.Module:
    outputs, inputs, *kernel = shape
    if kernel:
        return nn.Conv2d(inputs, outputs, tuple(kernel), bias=False)  # type: ignore[arg-type]
    return nn.Linear(inputs, outputs, bias=False)


class _Loss(torch.autograd.Function):
    """A loss with given gradients, which arrive through the graph as in a training step.

    ``torch.autograd.grad`` would check each of them in Python first, which takes as long as normalizing a small list.
    """

    @staticmethod
    def forward(ctx: Any, grads: list[Tensor], *weights: Tensor) -> Tensor:
        ctx.grads = grads
        return weights[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.grads


def setup(shapes: Sequence[Shape], backward: bool, device: torch.device, dtype: torch.dtype) -> dict[str, Make]:
    grads = [torch.randn(shape, dtype=dtype, device=device) for shape in shapes]

    def variant(finish: Callable[[Any], Any], backend: str | None = None) -> Run:
        torch.manual_seed(0)  # the same weights, u and v for each variant
        with device:
            model = _Layers(shapes).to(dtype)
        for layer in model.layers:
            parametrizations.spectral_norm(layer)
        originals = [layer.parametrizations.weight.original for layer in model.layers]  # type: ignore[union-attr]
        model = finish(model)

        def run() -> Sequence[Tensor]:
            weights: list[Tensor] = model()
            if not backward:
                return weights
            loss = _Loss.apply(grads, *weights)  # type: ignore[no-untyped-call]
            return torch.autograd.grad(loss, originals)  # type: ignore[arg-type]

        return run if backend is None else on_backend(backend, run)

    fuse = fnn.utils.fuse_spectral_norm
    variants: dict[str, Make] = {
        BASELINE: partial(variant, lambda model: model),
        "torch.compile": partial(variant, torch.compile),
        "reference": partial(variant, fuse, "reference"),
        "fastgan": partial(variant, fuse),
    }
    if device.type == "cuda":
        for backend in BY_NAME:
            if backends.why_not("spectral_norm", backend, device.type, dtype) is None:
                variants[backend] = partial(variant, fuse, backend)
    return variants


def _spectral_norm_case(list_name: str, shapes: Sequence[Shape], device_types: tuple[str, ...], backward: bool) -> Case:
    dtype = torch.float32
    elements = sum(map(prod, shapes))
    rows, columns = sum(shape[0] for shape in shapes), sum(prod(shape[1:]) for shape in shapes)
    # Forward reads W and v, writes W / sigma, u and v: two products (the last one gives sigma) and a division.
    moved, operations = 2 * elements + rows + 2 * columns, 5 * elements
    if backward:
        # G / sigma - <G, W> / sigma^2 u v^T reads G, W, u and v, and writes the result.
        moved, operations = moved + 3 * elements + rows + columns, operations + 5 * elements
    return Case(
        name=f"spectral_norm/{list_name}/{'forward_backward' if backward else 'forward'}",
        op="spectral_norm",
        dtype=dtype,
        device_types=device_types,
        bytes=moved * dtype.itemsize,
        operations=operations,
        tolerance=2e-4 if backward else 2e-5,
        setup=partial(setup, shapes, backward),
    )


CASES = [
    _spectral_norm_case(list_name, shapes, device_types, backward)
    for list_name, shapes, device_types in (
        ("sngan128", SNGAN128, ("cpu", "cuda")),
        ("small", SMALL, ("cpu", "cuda")),
        ("large", LARGE, ("cuda",)),
    )
    for backward in (False, True)
]
