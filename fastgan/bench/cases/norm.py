"""R1 through one normalization, from forward to double backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F

from fastgan import backends, ops
from fastgan.bench.case import BASELINE, BY_NAME, Case, Make, Run, on_backend
from fastgan.ops.gradient_penalty.kinds import penalize

SHAPE: tuple[int, ...] = (32, 128, 32, 32)
_Norm = Callable[..., Tensor]
_Penalty = Callable[[Tensor], Tensor]


def _batch_norm(batch_norm: _Norm, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return batch_norm(x, None, None, weight, bias, training=True)


# name -> PyTorch's and fastgan's functions of (x, weight, bias), and the part of x's shape that weight and bias have
NORMS: dict[str, tuple[_Norm, _Norm, slice]] = {
    "layer_norm": (
        lambda x, w, b: F.layer_norm(x, x.shape[1:], w, b),
        lambda x, w, b: ops.layer_norm(x, x.shape[1:], w, b),
        slice(1, None),
    ),
    "group_norm": (
        lambda x, w, b: F.group_norm(x, 32, w, b),
        lambda x, w, b: ops.group_norm(x, 32, w, b),
        slice(1, 2),
    ),
    "instance_norm": (  # with the defaults of nn.InstanceNorm2d
        lambda x: F.instance_norm(x),
        lambda x: ops.instance_norm(x),
        slice(0),
    ),
    "batch_norm": (partial(_batch_norm, F.batch_norm), partial(_batch_norm, ops.batch_norm), slice(1, 2)),
}


def _squares(grad: Tensor) -> Tensor:
    return grad.square().sum()


def _fast_squares(grad: Tensor) -> Tensor:
    return penalize("r1", grad, weight=2.0 * len(grad))


def r1(name: str, device: torch.device, dtype: torch.dtype, shape: tuple[int, ...] = SHAPE) -> dict[str, Make]:
    baseline, fused, of_affine = NORMS[name]
    x = torch.randn(shape, dtype=dtype, device=device)
    by_logits = torch.randn_like(x)  # gradient of the logits with respect to the normalized tensor
    sizes = [shape[of_affine]] * 2 if shape[of_affine] else []
    affine = [1 + torch.randn(size, dtype=dtype, device=device) / 4 for size in sizes]

    def variant(norm: _Norm, penalty: _Penalty, backend: str | None = None) -> Run:
        inputs = [t.clone().requires_grad_() for t in (x, *affine)]

        def run() -> Sequence[Tensor]:
            (grad,) = torch.autograd.grad(norm(*inputs), inputs[:1], by_logits, create_graph=True)
            return torch.autograd.grad(penalty(grad), inputs[:2])  # no penalty depends on the bias

        return run if backend is None else on_backend(backend, run)

    variants: dict[str, Make] = {
        BASELINE: partial(variant, baseline, _squares),
        "fastgan": partial(variant, fused, _fast_squares),
    }
    if device.type == "cuda":
        for backend in BY_NAME:
            if backends.why_not(name, backend, device.type, dtype) is None:
                variants[backend] = partial(variant, fused, _fast_squares, backend)
    return variants


def _case(name: str) -> Case:
    dtype = torch.float32
    of_affine = SHAPE[NORMS[name][2]]
    weights = prod(of_affine) if of_affine else 0
    # Forward reads x, writes y. Backward reads dy and x, writes dx. The penalty reads dx, writes its gradient. Double
    # backward reads that, dy and x, and writes the gradient of x. Each weight of LayerNorm is read four times.
    moved = 11 * prod(SHAPE) + 4 * weights
    return Case(
        name=f"norm/{name}/r1",
        op=name,
        dtype=dtype,
        device_types=("cpu", "cuda"),
        bytes=moved * dtype.itemsize,
        operations=45 * prod(SHAPE),  # per element: 7 forward, 10 backward, 2 penalty, 26 double backward
        tolerance=2e-3,
        setup=partial(r1, name),
    )


CASES = [_case(name) for name in NORMS]
