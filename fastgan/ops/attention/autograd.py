"""The operators of attention, their implementation on each backend, and the derivatives up to the second."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from fastgan import backends
from fastgan.ops.attention import blocks, blocks_second, pytorch_kernel, reference
from fastgan.ops.attention.layout import Options, is_far
from fastgan.ops.library import (
    accumulation_dtype,
    copy_back,
    is_eager,
    last_order,
    operator,
    stored,
    traced,
    without_autocast,
)
from fastgan.ops.needed import needed

P = ParamSpec("P")
R = TypeVar("R")

# q (B, H, L, E), k (B, G, S, E), v (B, G, S, Ev), mask (B, H, L, S) in which any size may be 1, o and lse of the
# forward, seed of the dropout. All operators write into tensors that the caller allocates. The blocks run on every
# device, for each backend but Triton.
_OPERANDS = "Tensor q, Tensor k, Tensor v, Tensor? mask"
_OPTIONS = "Tensor? seed, float scale, bool is_causal, float dropout_p, str backend"

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
backends.register("scaled_dot_product_attention", dict.fromkeys(("reference", "cpu", "triton"), frozenset(DTYPES)))


def _triton() -> Any:
    from fastgan.ops.attention import triton_kernels  # Triton is optional

    return triton_kernels


def _exactly(run: Callable[P, R]) -> Callable[P, R]:
    """Run without autocast, which would round the kernels' float32 intermediates."""

    @wraps(run)
    def exact(*args: P.args, **kwargs: P.kwargs) -> R:
        with without_autocast(next(t.device.type for t in args if isinstance(t, Tensor))):
            return run(*args, **kwargs)

    return exact


_reference = _exactly(reference.attention)
_pytorch_forward = _exactly(pytorch_kernel.forward)
_pytorch_backward = _exactly(pytorch_kernel.backward)


@operator(f"attention_fwd({_OPERANDS}, Tensor(a!) o, Tensor(b!) lse, {_OPTIONS})")
@_exactly
def _forward(*arguments: Any) -> None:
    q, k, v, mask, o, lse, seed, scale, is_causal, dropout_p, backend = arguments
    options = Options(scale, is_causal, dropout_p)
    if backend == "triton":
        _triton().forward(q, k, v, mask, seed, o, lse, options)
    elif pytorch_kernel.is_eligible(q, k, v, mask, dropout_p):
        for target, result in zip((o, lse), pytorch_kernel.forward(q, k, v, mask, options), strict=True):
            target.copy_(result)
    else:
        blocks.forward(q, k, v, mask, seed, o, lse, options)


def _results(q: Tensor, v: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """Allocate o, in the memory order (B, L, H, Ev) of PyTorch's result, and lse."""
    (batch, heads, length), wide = q.shape[:3], v.shape[-1]
    strides = length * heads * wide, wide, heads * wide, 1  # not a view, so that the user may write into it
    o = torch.empty_strided((batch, heads, length, wide), strides, dtype=q.dtype, device=q.device)
    terms = (2,) if backend == "triton" else ()  # rounded, and what rounding left out
    return o, q.new_empty(batch, heads, length, *terms, dtype=accumulation_dtype(q.dtype))


@operator(
    f"attention_bwd(Tensor g, {_OPERANDS}, Tensor o, Tensor lse,"
    f" Tensor(a!)? dq, Tensor(b!)? dk, Tensor(c!)? dv, Tensor(d!)? dmask, {_OPTIONS})"
)
@_exactly
def _backward(*given: Any) -> None:
    g, q, k, v, mask, o, lse, dq, dk, dv, dmask, seed, scale, is_causal, dropout_p, backend = given
    options = Options(scale, is_causal, dropout_p)
    targets = dq, dk, dv, dmask
    if _uses_pytorch_kernel(q, k, v, mask, lse, [t is not None for t in targets], options, backend):
        results = pytorch_kernel.backward(stored(g), q, k, v, mask, o, lse, options)
        for target, result in zip(targets, results, strict=False):
            copy_back(result, target)
        return
    arguments = stored(g), q, k, v, mask, o, lse, seed, *targets, options
    if backend == "triton":
        _triton().backward(*arguments)
    else:
        blocks.backward(*arguments, backend == "cpu")


@operator(
    "attention_bwd_bwd(Tensor? gq, Tensor? gk, Tensor? gv, Tensor? gmask,"
    f" Tensor g, {_OPERANDS}, Tensor o, Tensor lse,"
    " Tensor(a!)? by_g, Tensor(b!)? by_q, Tensor(c!)? by_k, Tensor(d!)? by_v, Tensor(e!)? by_mask,"
    f" {_OPTIONS})"
)
@_exactly
def _double_backward(*given: Any) -> None:
    *tensors, seed, scale, is_causal, dropout_p, backend = given
    grads, g, operands, results = tensors[:4], tensors[4], tensors[5:11], tensors[11:]
    grads = [None if t is None else stored(t) for t in grads]
    options = Options(scale, is_causal, dropout_p)
    arguments = *grads, stored(g), *operands, seed, *results, options
    if backend == "triton":
        _triton().double_backward(*arguments)
        return
    run: Any = blocks_second.double_backward
    run(*arguments, backend == "cpu")


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        seed: Tensor | None,
        options: Options,
        backend: str,
    ) -> Tensor:
        o, lse = _run_forward(q, k, v, mask, seed, options, backend)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, mask, o, lse, seed)
        ctx.options, ctx.backend = options, backend
        return o

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, ...]:
        wanted = needed(ctx)[:4]
        if g is None or not any(wanted):
            return (None,) * 7
        # Without create_graph the backward needs no graph of its own.
        run: Any = _AttentionBackward.apply if torch.is_grad_enabled() else _run_backward
        q, k, v, mask, o, lse, seed = ctx.saved_tensors
        grads = run(g, q, k, v, mask, o.detach(), lse, seed, wanted, ctx.options, ctx.backend)
        return *grads, None, None, None


def _run_forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, seed: Tensor | None, options: Options, backend: str
) -> tuple[Tensor, Tensor]:
    is_direct = is_eager(q)
    if is_direct and backend != "triton" and pytorch_kernel.is_eligible(q, k, v, mask, options.dropout_p):
        return _pytorch_forward(q, k, v, mask, options)  # without the operator's copy
    o, lse = _results(q, v, backend)
    run: Any = _forward if is_direct else traced("attention_fwd")
    run(q, k, v, mask, o, lse, seed, *options, backend)
    return o, lse


def _uses_pytorch_kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    lse: Tensor,
    wanted: Sequence[bool],
    options: Options,
    backend: str,
) -> bool:
    """Return whether PyTorch's kernel computes the backward."""
    eligible = backend != "triton" and pytorch_kernel.is_eligible(q, k, v, mask, options.dropout_p)
    return eligible and pytorch_kernel.is_faster(q, wanted) and not is_far(lse)


def _run_backward(
    g: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    o: Tensor,
    lse: Tensor,
    seed: Tensor | None,
    wanted: tuple[bool, ...],
    options: Options,
    backend: str,
) -> tuple[Tensor | None, ...]:
    operands = q, k, v, mask
    is_direct = is_eager(g)
    if is_direct and _uses_pytorch_kernel(q, k, v, mask, lse, wanted, options, backend):
        grads = _pytorch_backward(stored(g), q, k, v, mask, o, lse, options)
        return *(grad if want else None for grad, want in zip(grads, wanted, strict=False)), None
    results = [
        torch.empty_like(t) if t is not None and want else None for t, want in zip(operands, wanted, strict=True)
    ]
    run: Any = _backward if is_direct else traced("attention_bwd")
    run(g, *operands, o, lse, *results, seed, *options, backend)
    return tuple(results)


class _AttentionBackward(torch.autograd.Function):
    """The backward. o, lse and seed are not differentiated; the double backward includes how o and lse are computed."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*arguments[:8])
        ctx.options, ctx.backend = arguments[-2:]
        return _run_backward(*arguments)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        g, q, k, v, mask, o, lse, seed = ctx.saved_tensors
        operands = g, q, k, v, mask
        wanted = ctx.needs_input_grad[:5]
        if all(grad is None for grad in grads) or not any(wanted):
            return (None,) * 11
        with torch.no_grad():
            results = [
                torch.empty_like(t) if t is not None and want else None
                for t, want in zip(operands, wanted, strict=True)
            ]
            run: Any = _double_backward if is_eager(g) else traced("attention_bwd_bwd")
            run(*grads, *operands, o, lse, *results, seed, *ctx.options, ctx.backend)
        if torch.is_grad_enabled():
            message = (
                "scaled_dot_product_attention: the third derivative is not supported; "
                "use_backend('reference') has every order"
            )
            results = last_order(message, results, [*grads, *operands])
        return *results, None, None, None, None, None, None


def fits_triton(q: Tensor, v: Tensor) -> bool:
    """Return whether Triton's kernels take heads of this width on this device."""
    return bool(_triton().fits(q, v))


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, options: Options, backend: str) -> Tensor:
    """Run the op on canonical operands on the chosen backend."""
    if backend == "reference":
        return _reference(q, k, v, mask, *options)
    q, k, v = stored(q), stored(k), stored(v)
    seed = torch.randint(2**62, (), device=q.device) if options.dropout_p > 0 else None
    result: Tensor = _Attention.apply(q, k, v, mask, seed, options, backend)
    return result
