"""Minibatch standard deviation of a discriminator's last features: forward, backward, and R1 through it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import prod

import torch
from torch import Tensor

from fastgan import backends, ops
from fastgan.bench.case import BASELINE, BY_NAME, Case, Make, Run, on_backend
from fastgan.ops.minibatch_stddev import reference

Shape = tuple[int, ...]
GROUP_SIZE, EPS = 4, 1e-8
ORDERS = ("forward", "forward_backward", "r1")

# The size at which StyleGAN's discriminators use the layer, and a larger one.
SHAPES: dict[str, Shape] = {"4x4": (32, 512, 4, 4), "16x16": (32, 512, 16, 16)}


def setup(shape: Shape, order: str, device: torch.device, dtype: torch.dtype) -> dict[str, Make]:
    x = torch.randn(shape, device=device, dtype=dtype, requires_grad=order != "forward")
    grad = torch.randn(shape[0], shape[1] + 1, *shape[2:], device=device, dtype=dtype, requires_grad=order == "r1")
    grad_grad = torch.randn(shape, device=device, dtype=dtype)

    def variant(op: Callable[[Tensor], Tensor], backend: str | None = None) -> Run:
        def run() -> Sequence[Tensor]:
            y = op(x)
            if order == "forward":
                return [y]
            if order == "forward_backward":
                return torch.autograd.grad(y, x, grad)
            (first,) = torch.autograd.grad(y, x, grad, create_graph=True)
            return torch.autograd.grad(first, (x, grad), grad_grad)

        return run if backend is None else on_backend(backend, run)

    def chain(x: Tensor) -> Tensor:
        return reference.minibatch_stddev(x, GROUP_SIZE, 1, EPS)

    fused = partial(ops.minibatch_stddev, group_size=GROUP_SIZE, eps=EPS)
    variants: dict[str, Make] = {
        BASELINE: partial(variant, chain),
        "torch.compile": lambda: variant(torch.compile(chain)),
        "reference": partial(variant, fused, "reference"),
        "fastgan": partial(variant, fused),
    }
    if device.type == "cuda":
        for backend in BY_NAME:
            if backends.why_not("minibatch_stddev", backend, device.type, dtype) is None:
                variants[backend] = partial(variant, fused, backend)
    return variants


def _stddev_case(size: str, shape: Shape, order: str) -> Case:
    dtype = torch.float32
    values, appended = prod(shape), shape[0] * prod(shape[2:])
    # Forward reads x, writes x and the statistics. It computes mean, square, sum and root of each value.
    moved, operations = 2 * values + appended, 5 * values
    if order != "forward":  # reads the gradient and x, writes the result
        moved, operations = moved + 3 * values + appended, operations + 8 * values
    if order == "r1":  # reads its gradient and x, writes two results
        moved, operations = moved + 4 * values + appended, operations + 14 * values
    return Case(
        name=f"minibatch_stddev/{size}/{order}",
        op="minibatch_stddev",
        dtype=dtype,
        device_types=("cpu", "cuda"),
        bytes=moved * dtype.itemsize,
        operations=operations,
        tolerance={"forward": 2e-5, "forward_backward": 2e-4, "r1": 2e-3}[order],
        setup=partial(setup, shape, order),
    )


CASES = [_stddev_case(size, shape, order) for size, shape in SHAPES.items() for order in ORDERS]
