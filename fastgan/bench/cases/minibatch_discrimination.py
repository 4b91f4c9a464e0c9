"""Minibatch discrimination: forward, forward + backward, and the double backward alone.

The baseline is the naive form, which holds every term of every pair. Where memory does not hold several such tensors
the baseline is ``torch.cdist``, and there is no variant of that name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from fastgan import backends, ops
from fastgan.bench.case import BASELINE, BY_NAME, Case, Make, Run, on_backend

KERNELS = 100
ORDERS = ("forward", "forward_backward", "double_backward")

Discriminate = Callable[[Tensor], Tensor]


def naive(m: Tensor) -> Tensor:
    """As it is usually written."""
    return torch.exp(-(m[:, None] - m).abs().sum(-1)).sum(1) - 1


def by_cdist(m: Tensor) -> Tensor:
    """Distances of all pairs, without their C terms. cdist has no double backward."""
    m = m.transpose(0, 1)
    return (torch.exp(-torch.cdist(m, m, p=1)).sum(2) - 1).t()


def _naive_fits(samples: int, dims: int, device: torch.device, dtype: torch.dtype) -> bool:
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 4 << 30
    return 6 * samples**2 * KERNELS * dims * dtype.itemsize < free


def _minibatch_discrimination(
    samples: int, dims: int, order: str, *, device: torch.device, dtype: torch.dtype
) -> dict[str, Make]:
    m = (torch.randn(samples, KERNELS, dims, dtype=dtype, device=device) / dims).requires_grad_()
    h = torch.randn(samples, KERNELS, dtype=dtype, device=device, requires_grad=True)
    w = torch.randn_like(m)

    def variant(discriminate: Discriminate, backend: str | None = None) -> Run:
        def forward() -> Sequence[Tensor]:
            return [discriminate(m)]

        def forward_backward() -> Sequence[Tensor]:
            return torch.autograd.grad(discriminate(m), m, h)

        run = {"forward": forward, "forward_backward": forward_backward}.get(order)
        if run is None:
            with backends.use_backend(backend or "auto"):
                (grad,) = torch.autograd.grad(discriminate(m), m, h, create_graph=True)
            return lambda: torch.autograd.grad(grad, (h, m), w, retain_graph=True)
        return run if backend is None else on_backend(backend, run)

    fits = _naive_fits(samples, dims, device, dtype)
    second = order == "double_backward"
    variants: dict[str, Make] = {BASELINE: partial(variant, naive if fits else by_cdist)}
    if fits and not second:
        variants["cdist"] = partial(variant, by_cdist)
    variants["fastgan"] = partial(variant, ops.minibatch_discrimination)
    if device.type == "cuda":
        for backend in BY_NAME:
            if backends.why_not("minibatch_discrimination", backend, device.type, dtype) is None:
                variants[backend] = partial(variant, ops.minibatch_discrimination, backend)
    return variants


def _case(samples: int, dims: int, order: str, device_types: tuple[str, ...]) -> Case:
    dtype = torch.float32
    values, pairs = samples * KERNELS * dims, samples * samples * KERNELS
    # m read, o written; h and m read, dm written; w, h and m read, by_h and by_m written.
    moved = {
        "forward": values + samples * KERNELS,
        "forward_backward": 3 * values + 2 * samples * KERNELS,
        "double_backward": 3 * values + 2 * samples * KERNELS,
    }
    # Each pair seen from both sides, without its exponential: a subtraction and an addition a dim, two more for each
    # side's gradient, two for the tangents.
    operations = {"forward": 2, "forward_backward": 6, "double_backward": 6}
    return Case(
        name=f"minibatch_discrimination/{samples}x{KERNELS}x{dims}/{order}",
        op="minibatch_discrimination",
        dtype=dtype,
        device_types=device_types,
        bytes=moved[order] * dtype.itemsize,
        operations=operations[order] * pairs * dims,
        tolerance={"forward": 2e-5, "forward_backward": 2e-4, "double_backward": 2e-3}[order],
        setup=lambda device, dtype: _minibatch_discrimination(samples, dims, order, device=device, dtype=dtype),
    )


def _device_types(samples: int, dims: int, order: str) -> tuple[str, ...]:
    """On a CPU what takes the naive form about a second at most."""
    quick = samples == 64 or (samples == 256 and dims == 16 and order != "double_backward")
    return ("cpu", "cuda") if quick else ("cuda",)


# The double backward where the naive form, the only one that has it, fits.
CASES = [
    _case(samples, dims, order, _device_types(samples, dims, order))
    for samples in (64, 256, 1024, 4096)
    for dims in (5, 16)
    for order in ORDERS
    if order != "double_backward" or samples <= 256
]
