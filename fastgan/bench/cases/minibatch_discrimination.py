"""Minibatch discrimination: forward, forward + backward, and the double backward alone.

The baseline is the naive form, which stores every term of every pair. If several such tensors exceed the memory, the
baseline is ``torch.cdist`` and there is no variant of that name. In double backward, which cdist does not support, and
in memory cases, the naive form is left out instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from fastgan import backends, ops
from fastgan.bench.case import BASELINE, BY_NAME, Case, Make, Run, TooLarge, on_backend

KERNELS = 100
ORDERS = ("forward", "forward_backward", "double_backward")

Discriminate = Callable[[Tensor], Tensor]


def naive(m: Tensor) -> Tensor:
    """The usual implementation."""
    return torch.exp(-(m[:, None] - m).abs().sum(-1)).sum(1) - 1


def by_cdist(m: Tensor) -> Tensor:
    """Distances of all pairs without storing their C terms. cdist has no double backward."""
    m = m.transpose(0, 1)
    return (torch.exp(-torch.cdist(m, m, p=1)).sum(2) - 1).t()


def _fits(elements: int, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether several tensors of that size fit in memory. CPUs are assumed to have 4 GiB."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 4 << 30
    return 6 * elements * dtype.itemsize < free


def setup(
    samples: int,
    kernels: int,
    dims: int,
    order: str,
    device: torch.device,
    dtype: torch.dtype,
    *,
    naively: bool = False,
) -> dict[str, Make]:
    """Return the variants. ``naively``: BASELINE is always the naive form, and is left out if it does not fit."""
    m = (torch.randn(samples, kernels, dims, dtype=dtype, device=device) / dims).requires_grad_()
    h = torch.randn(samples, kernels, dtype=dtype, device=device, requires_grad=True)
    w = torch.randn_like(m)
    terms, pairs = samples**2 * kernels * dims, samples**2 * kernels

    def variant(discriminate: Discriminate, backend: str | None = None) -> Run:
        def forward() -> Sequence[Tensor]:
            return [discriminate(m)]

        def forward_backward() -> Sequence[Tensor]:
            return torch.autograd.grad(discriminate(m), m, h)

        def second_order() -> Sequence[Tensor]:
            (grad,) = torch.autograd.grad(discriminate(m), m, h, create_graph=True)
            return torch.autograd.grad(grad, (h, m), w)

        run = {"forward": forward, "forward_backward": forward_backward, "second_order": second_order}.get(order)
        if run is None:
            with backends.use_backend(backend or "auto"):
                (grad,) = torch.autograd.grad(discriminate(m), m, h, create_graph=True)
            return lambda: torch.autograd.grad(grad, (h, m), w, retain_graph=True)
        return run if backend is None else on_backend(backend, run)

    def too_large(elements: int) -> Run:
        raise TooLarge(f"tensors of {elements * dtype.itemsize / 1e9:.1f} GB each do not fit")

    fits, second = _fits(terms, device, dtype), order in ("double_backward", "second_order")
    variants: dict[str, Make] = {BASELINE: partial(variant, naive if fits else by_cdist)}
    if naively and not fits:
        variants[BASELINE] = partial(too_large, terms)
    if (fits or naively) and not second:
        variants["cdist"] = partial(variant, by_cdist) if _fits(pairs, device, dtype) else partial(too_large, pairs)
    variants["fastgan"] = partial(variant, ops.minibatch_discrimination)
    if device.type == "cuda":
        for backend in BY_NAME:
            if backends.why_not("minibatch_discrimination", backend, device.type, dtype) is None:
                variants[backend] = partial(variant, ops.minibatch_discrimination, backend)
    return variants


def _case(samples: int, dims: int, order: str, device_types: tuple[str, ...]) -> Case:
    dtype = torch.float32
    values, pairs = samples * KERNELS * dims, samples * samples * KERNELS
    # Forward reads m, writes o. Backward reads h and m, writes dm. Double backward reads w, h, m, writes by_h, by_m.
    moved = {
        "forward": values + samples * KERNELS,
        "forward_backward": 3 * values + 2 * samples * KERNELS,
        "double_backward": 3 * values + 2 * samples * KERNELS,
    }
    # Each pair counts from both sides, without its exponential: a subtraction and an addition per dim, two more for
    # each side's gradient, two for the tangents.
    operations = {"forward": 2, "forward_backward": 6, "double_backward": 6}
    return Case(
        name=f"minibatch_discrimination/{samples}x{KERNELS}x{dims}/{order}",
        op="minibatch_discrimination",
        dtype=dtype,
        device_types=device_types,
        bytes=moved[order] * dtype.itemsize,
        operations=operations[order] * pairs * dims,
        tolerance={"forward": 2e-5, "forward_backward": 2e-4, "double_backward": 2e-3}[order],
        setup=partial(setup, samples, KERNELS, dims, order, naively=order == "double_backward"),
        counted=("peak",),
        family=f"minibatch_discrimination/{KERNELS}x{dims}/{order}",
        sizes={"batch": samples},
    )


def _memory_case(samples: int, dims: int, order: str) -> Case:
    """A memory case: all passes of an order."""
    return Case(
        name=f"memory/minibatch_discrimination/{samples}x{KERNELS}x{dims}/{order}",
        op="minibatch_discrimination",
        dtype=torch.float32,
        device_types=("cpu", "cuda"),
        bytes=None,
        operations=None,
        tolerance=2e-3,
        setup=partial(setup, samples, KERNELS, dims, order, naively=True),
        suite="memory",
        counted=("peak", "saved"),
        family=f"memory/minibatch_discrimination/{KERNELS}x{dims}/{order}",
        sizes={"batch": samples},
    )


def _device_types(samples: int, dims: int, order: str) -> tuple[str, ...]:
    """On CPUs, only cases in which the naive form takes at most about a second."""
    quick = samples == 64 or (samples == 256 and dims == 16 and order != "double_backward")
    return ("cpu", "cuda") if quick else ("cuda",)


CASES = [
    _case(samples, dims, order, _device_types(samples, dims, order))
    for samples in (64, 256, 1024, 4096)
    for dims in (5, 16)
    for order in ORDERS
]
CASES += [
    _memory_case(samples, dims, order)
    for samples in (64, 256, 1024, 4096)
    for dims in (5, 16)
    for order in ("forward", "forward_backward", "second_order")
]
