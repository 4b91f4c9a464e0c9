"""Spectral normalisation as operators and autograd Functions: first order fused, second order exact, third raises."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from functools import cache, partial
from typing import Any, cast

import torch
from torch import Tensor

from fastgan import backends
from fastgan.ops.library import (
    LIBRARY,
    accumulation_dtype,
    is_batched,
    is_eager,
    last_order,
    returns_nothing,
    stored,
)
from fastgan.ops.spectral_norm import native_kernels, reference
from fastgan.ops.spectral_norm.layout import layout_of, split_saved

# Both write into tensors that they are given: an operator that renews its arguments may not also return a list.
LIBRARY.define(
    "spectral_norm_fwd(Tensor[] weights, Tensor(a!)[] us, Tensor(b!)[] vs, Tensor(c!)[] outputs, Tensor(d!) saved,"
    " int[] dims, int n_power_iterations, float eps, bool v_first, str backend) -> ()"
)
LIBRARY.define(
    "spectral_norm_bwd(Tensor[] grads, Tensor[] weights, Tensor saved, Tensor(a!)[] outputs, int[] offsets, int[] dims,"
    " str backend) -> ()"
)

_is_none = partial(operator.is_, None)
_DTYPES = frozenset({torch.float32, torch.float64, torch.float16, torch.bfloat16})
backends.register("spectral_norm", dict.fromkeys(backends.BACKENDS, _DTYPES))


@torch.library.impl(LIBRARY, "spectral_norm_fwd", "CompositeExplicitAutograd")
def _forward(
    weights: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    saved: Tensor,
    dims: Sequence[int],
    n_power_iterations: int,
    eps: float,
    v_first: bool,
    backend: str,
) -> None:
    inputs, targets = _contiguous(weights), _contiguous_targets(outputs)
    layout = layout_of(weights, dims)
    _kernels(backend).forward(inputs, targets, us, vs, saved, layout, n_power_iterations, eps, v_first)
    _copy_back(targets, outputs)


@torch.library.impl(LIBRARY, "spectral_norm_bwd", "CompositeExplicitAutograd")
def _backward(
    grads: Sequence[Tensor],
    weights: Sequence[Tensor],
    saved: Tensor,
    outputs: Sequence[Tensor],
    offsets: Sequence[int],
    dims: Sequence[int],
    backend: str,
) -> None:
    layout = layout_of(weights, dims)._replace(offsets=tuple(offsets))  # of some of the weights of a forward
    inputs, targets = _contiguous(weights), _contiguous_targets(outputs)
    _kernels(backend).backward(_contiguous(grads), inputs, targets, saved, layout)
    _copy_back(targets, outputs)


returns_nothing("spectral_norm_fwd", "spectral_norm_bwd")


@cache
def _kernels(backend: str) -> Any:
    if backend == "triton":
        from fastgan.ops.spectral_norm import triton_kernels  # Triton is optional

        return triton_kernels
    return native_kernels.Native(backend)


def _contiguous(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    if all(map(Tensor.is_contiguous, tensors)) and not any(
        t._is_zerotensor() or t.is_neg() or is_batched(t) for t in tensors
    ):
        return tensors
    return [stored(t).contiguous() for t in tensors]


def _contiguous_targets(outputs: Sequence[Tensor]) -> Sequence[Tensor]:
    """What the kernels write: each output, or a contiguous stand-in for one in another memory format."""
    if all(map(Tensor.is_contiguous, outputs)):
        return outputs
    return [o if o.is_contiguous() else torch.empty_like(o, memory_format=torch.contiguous_format) for o in outputs]


def _copy_back(targets: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
    if targets is outputs:
        return
    for target, output in zip(targets, outputs, strict=True):
        if target is not output:
            output.copy_(target)


class _SpectralNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        us: list[Tensor],
        vs: list[Tensor],
        dims: list[int],
        n_power_iterations: int,
        eps: float,
        v_first: bool,
        backend: str,
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:
        outputs = list(map(torch.empty_like, weights))
        dtype = accumulation_dtype(weights[0].dtype)
        saved = torch.empty(layout_of(weights, dims).total, dtype=dtype, device=weights[0].device)
        run = _forward if is_eager(weights[0]) else torch.ops.fastgan.spectral_norm_fwd
        run(weights, us, vs, outputs, saved, dims, n_power_iterations, eps, v_first, backend)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(saved, *weights)
        ctx.dims, ctx.backend = dims, backend
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        saved, *weights = ctx.saved_tensors
        offsets: Sequence[int] = layout_of(weights, ctx.dims).offsets
        dims: Sequence[int] = ctx.dims
        # Without create_graph nothing will be asked of the backward's own graph.
        run = _SpectralNormBackward.apply if torch.is_grad_enabled() else _run_backward
        needed = ctx.needs_input_grad[7:]
        if all(needed) and not any(map(_is_none, grads)):
            all_grads = cast(tuple[Tensor, ...], grads)
            return *(None,) * 7, *run(saved, offsets, dims, ctx.backend, *all_grads, *weights)
        wanted = [i for i, grad in enumerate(grads) if grad is not None and needed[i]]
        result: list[Tensor | None] = [None] * len(weights)
        if wanted:
            tensors = [grads[i] for i in wanted] + [weights[i] for i in wanted]
            call = saved, [offsets[i] for i in wanted], [dims[i] for i in wanted], ctx.backend
            for i, grad in zip(wanted, run(*call, *tensors), strict=True):
                result[i] = grad
        return (None,) * 7 + tuple(result)


def _run_backward(
    saved: Tensor, offsets: Sequence[int], dims: Sequence[int], backend: str, *grads_and_weights: Tensor
) -> list[Tensor]:
    grads, weights = grads_and_weights[: len(dims)], grads_and_weights[len(dims) :]
    outputs = list(map(torch.empty_like, weights))
    run = _backward if is_eager(grads[0]) else torch.ops.fastgan.spectral_norm_bwd
    run(grads, weights, saved, outputs, offsets, dims, backend)
    return outputs


class _SpectralNormBackward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, saved: Tensor, offsets: Sequence[int], dims: Sequence[int], backend: str, *grads_and_weights: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(saved, *grads_and_weights)
        ctx.offsets, ctx.dims = offsets, dims
        return tuple(_run_backward(saved, offsets, dims, backend, *grads_and_weights))

    @staticmethod
    def backward(ctx: Any, *grads_of_grads: Tensor | None) -> tuple[Tensor | None, ...]:
        saved, *grads_and_weights = ctx.saved_tensors
        with torch.no_grad():
            results = _double_backward(saved, ctx.offsets, ctx.dims, grads_of_grads, grads_and_weights)
        if torch.is_grad_enabled():
            message = "spectral_norm: the third derivative is not supported; use_backend('reference') has every order"
            results = last_order(message, results, [*grads_of_grads, *grads_and_weights])
        return None, None, None, None, *results


def _double_backward(
    saved: Tensor,
    offsets: Sequence[int],
    dims: Sequence[int],
    grads_of_grads: Sequence[Tensor | None],
    grads_and_weights: Sequence[Tensor],
) -> list[Tensor | None]:
    """The derivatives by each gradient, then by each weight."""
    half = len(dims)
    grads, weights = grads_and_weights[:half], grads_and_weights[half:]
    matrices = layout_of(weights, dims).matrices
    results: list[Tensor | None] = [None] * (2 * half)
    for i, h in enumerate(grads_of_grads):
        if h is not None:
            sigma, u, v = split_saved(saved, offsets[i], matrices[i])
            results[i], results[half + i] = reference.double_backward(h, grads[i], weights[i], sigma, u, v, dims[i])
    return results


def normalise(
    weights: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    dims: Sequence[int],
    n_power_iterations: int,
    eps: float,
    v_first: bool,
    backend: str | None = None,
) -> list[Tensor]:
    """The op without its checks, for callers that have made the buffers themselves. n_power_iterations = 0: eval."""
    chosen = backends.select("spectral_norm", weights[0].device, weights[0].dtype, backend)
    if chosen == "reference":
        return reference.spectral_norm(weights, us, vs, dims, n_power_iterations, eps, v_first)
    outputs = _SpectralNorm.apply(list(us), list(vs), list(dims), n_power_iterations, eps, v_first, chosen, *weights)
    return list(outputs)
