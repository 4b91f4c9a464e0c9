"""Operators and autograd Functions of spectral norm. The first order is fused, the second exact; the third raises."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor

from fastgan import backends
from fastgan.ops.library import (
    accumulation_dtype,
    is_eager,
    is_traced,
    last_order,
    operator,
    stored,
    traced,
)
from fastgan.ops.spectral_norm import native_kernels, reference
from fastgan.ops.spectral_norm.layout import Layout, layout_of, split_saved

_DTYPES = frozenset({torch.float32, torch.float64, torch.float16, torch.bfloat16})
backends.register("spectral_norm", dict.fromkeys(backends.BACKENDS, _DTYPES))


@operator(
    "spectral_norm_fwd(Tensor[] weights, Tensor(a!rw)[] us, Tensor(b!rw)[] vs, Tensor(c!)[] outputs, Tensor(d!) saved,"
    " int[] dims, int n_power_iterations, float eps, bool v_first, str backend)"
)
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
    _run_forward(weights, us, vs, outputs, saved, layout_of(weights, dims), n_power_iterations, eps, v_first, backend)


def _run_forward(
    weights: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    saved: Tensor,
    layout: Layout,
    n_power_iterations: int,
    eps: float,
    v_first: bool,
    backend: str,
) -> None:
    inputs, targets = _contiguous(weights), _contiguous_targets(outputs)
    _kernels(backend).forward(inputs, targets, us, vs, saved, layout, n_power_iterations, eps, v_first)
    _copy_back(targets, outputs)


@operator(
    "spectral_norm_bwd(Tensor[] grads, Tensor[] weights, Tensor saved, Tensor(a!)[] outputs, int[] offsets, int[] dims,"
    " str backend)"
)
def _backward(
    grads: Sequence[Tensor],
    weights: Sequence[Tensor],
    saved: Tensor,
    outputs: Sequence[Tensor],
    offsets: Sequence[int],
    dims: Sequence[int],
    backend: str,
) -> None:
    layout = layout_of(weights, dims)._replace(offsets=tuple(offsets))  # a subset of the forward's weights
    _run_backward(grads, weights, saved, outputs, layout, backend)


def _run_backward(
    grads: Sequence[Tensor],
    weights: Sequence[Tensor],
    saved: Tensor,
    outputs: Sequence[Tensor],
    layout: Layout,
    backend: str,
) -> None:
    inputs, targets = _contiguous(weights), _contiguous_targets(outputs)
    _kernels(backend).backward(_contiguous(grads), inputs, targets, saved, layout)
    _copy_back(targets, outputs)


@cache
def _kernels(backend: str) -> Any:
    if backend == "triton":
        from fastgan.ops.spectral_norm import triton_kernels  # Triton is optional

        return triton_kernels
    return native_kernels.Native(backend)


def _contiguous(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    return tensors if _in_memory(tensors) else [stored(t).contiguous() for t in tensors]


def _in_memory(tensors: Sequence[Tensor]) -> bool:
    """Return whether kernels can read the values of each tensor in memory, in order.

    This takes three calls per tensor. More calls would slow down small models.
    """
    try:
        have_addresses = all(map(Tensor.data_ptr, tensors))  # zero tensors without storage have no address
    except RuntimeError:  # batched gradients have no address either
        return False
    return have_addresses and all(map(Tensor.is_contiguous, tensors)) and not any(map(Tensor.is_neg, tensors))


def _contiguous_targets(outputs: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return the tensors that the kernels write: each output, or a contiguous buffer if it has another format."""
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
        layout: Layout,
        n_power_iterations: int,
        eps: float,
        v_first: bool,
        backend: str,
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:
        outputs = list(map(torch.empty_like, weights))
        dtype = accumulation_dtype(weights[0].dtype)
        saved = torch.empty(layout.total, dtype=dtype, device=weights[0].device)
        settings = n_power_iterations, eps, v_first, backend
        if is_eager(weights[0]):
            _run_forward(weights, us, vs, outputs, saved, layout, *settings)
        else:
            traced("spectral_norm_fwd")(weights, us, vs, outputs, saved, layout.dims, *settings)
        ctx.set_materialize_grads(False)
        _keep(ctx, saved, weights)
        ctx.layout, ctx.backend = layout, backend
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        saved, *weights = ctx.saved_tensors or ctx.kept
        # Without create_graph the backward needs no graph of its own.
        run = _SpectralNormBackward.apply if torch.is_grad_enabled() else _grads_of_weights
        needed = ctx.needs_input_grad[7:]
        wanted = [i for i, grad in enumerate(grads) if grad is not None and needed[i]]
        if not ctx.saved_tensors:  # save_for_backward makes this check itself
            _check_versions(ctx, weights, wanted)
        if len(wanted) == len(weights):
            all_grads = cast(tuple[Tensor, ...], grads)
            return *(None,) * 7, *run(saved, ctx.layout, ctx.backend, *all_grads, *weights)
        result: list[Tensor | None] = [None] * len(weights)
        if wanted:
            tensors = [grads[i] for i in wanted] + [weights[i] for i in wanted]
            for i, grad in zip(wanted, run(saved, ctx.layout.of(wanted), ctx.backend, *tensors), strict=True):
                result[i] = grad
        return (None,) * 7 + tuple(result)


def _keep(ctx: Any, saved: Tensor, weights: Sequence[Tensor]) -> None:
    """Keep the tensors for several backwards.

    Autograd frees saved tensors at the first backward through a node. PyTorch's spectral norm has one node per weight,
    so separate losses on different weights can run backward one after the other. This node must allow the same.
    """
    if torch.compiler.is_compiling():
        ctx.save_for_backward(saved, *weights)
    elif any(ctx.needs_input_grad):
        ctx.kept = saved, *weights
        ctx.versions = [_version(weight) for weight in weights]


def _version(weight: Tensor) -> int:
    return 0 if weight.is_inference() else weight._version


def _check_versions(ctx: Any, weights: Sequence[Tensor], wanted: Sequence[int]) -> None:
    for i in wanted:
        if ctx.versions[i] != _version(weights[i]):
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"a weight {tuple(weights[i].shape)} under spectral norm is at version {weights[i]._version}; "
                f"expected version {ctx.versions[i]} instead"
            )


def _grads_of_weights(saved: Tensor, layout: Layout, backend: str, *grads_and_weights: Tensor) -> list[Tensor]:
    half = len(layout.dims)
    grads, weights = grads_and_weights[:half], grads_and_weights[half:]
    outputs = list(map(torch.empty_like, weights))
    if is_eager(grads[0]):
        _run_backward(grads, weights, saved, outputs, layout, backend)
    else:
        traced("spectral_norm_bwd")(grads, weights, saved, outputs, layout.offsets, layout.dims, backend)
    return outputs


class _SpectralNormBackward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, saved: Tensor, layout: Layout, backend: str, *grads_and_weights: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(saved, *grads_and_weights)
        ctx.layout = layout
        return tuple(_grads_of_weights(saved, layout, backend, *grads_and_weights))

    @staticmethod
    def backward(ctx: Any, *grads_of_grads: Tensor | None) -> tuple[Tensor | None, ...]:
        saved, *grads_and_weights = ctx.saved_tensors
        with torch.no_grad():
            results = _double_backward(saved, ctx.layout, grads_of_grads, grads_and_weights)
        if torch.is_grad_enabled():
            message = "spectral_norm: the third derivative is not supported; use_backend('reference') has every order"
            results = last_order(message, results, [*grads_of_grads, *grads_and_weights])
        return None, None, None, *results


def _double_backward(
    saved: Tensor, layout: Layout, grads_of_grads: Sequence[Tensor | None], grads_and_weights: Sequence[Tensor]
) -> list[Tensor | None]:
    """Return the derivatives with respect to each gradient, then with respect to each weight."""
    half = len(layout.dims)
    grads, weights = grads_and_weights[:half], grads_and_weights[half:]
    results: list[Tensor | None] = [None] * (2 * half)
    for i, (h, dim, matrix, offset) in enumerate(
        zip(grads_of_grads, layout.dims, layout.matrices, layout.offsets, strict=True)
    ):
        if h is not None:
            sigma, u, v = split_saved(saved, offset, matrix)
            results[i], results[half + i] = reference.double_backward(h, grads[i], weights[i], sigma, u, v, dim)
    return results


def normalize(
    weights: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    dims: Sequence[int],
    n_power_iterations: int,
    eps: float,
    v_first: bool,
    backend: str | None = None,
) -> list[Tensor]:
    """Run the op without argument checks, for callers that own the buffers. n_power_iterations = 0 means evaluation."""
    chosen = backends.select("spectral_norm", weights[0].device, weights[0].dtype, backend)
    if chosen == "reference" or (is_traced() and not torch.compiler.is_dynamo_compiling()):
        return reference.spectral_norm(weights, us, vs, dims, n_power_iterations, eps, v_first)
    layout = layout_of(weights, dims)
    outputs = _SpectralNorm.apply(list(us), list(vs), layout, n_power_iterations, eps, v_first, chosen, *weights)
    return list(outputs)
