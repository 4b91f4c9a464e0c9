"""The operators of minibatch discrimination, their implementation on each backend, and the derivatives.

The sum over pairs is symmetric. At each order, the result of a row depends on the operands of all rows (the formulas
are in csrc/cpu/minibatch_discrimination.cpp). So each process of a group computes only its own rows and gathers the
operands first: m in the forward, the gradients of o (1 / C of the size of m) in the backward, and the tangents in the
second order.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from fastgan import backends
from fastgan.ops.higher_orders import double_backward, gradients
from fastgan.ops.library import accumulation_dtype, copy_back, is_eager, operator, stored, traced
from fastgan.ops.minibatch_discrimination import native_kernels, reference
from fastgan.ops.minibatch_discrimination.ranks import Group, differentiable_gather, first_row, gather

# h: gradient of o, w: gradient of dm. The inputs h, w, segments and m (packed for the backend) hold the rows of all
# ranks. The outputs hold this rank's rows, which start at `first`.

_DTYPES = frozenset({torch.float32, torch.float64, torch.float16, torch.bfloat16})
backends.register("minibatch_discrimination", dict.fromkeys(backends.BACKENDS, _DTYPES))


@operator(
    "minibatch_discrimination_fwd(Tensor m, Tensor? segments, Tensor(a!) o, int first, bool exclude_self, str backend)"
)
def _forward(m: Tensor, segments: Tensor | None, o: Tensor, first: int, exclude_self: bool, backend: str) -> None:
    _kernels(backend).forward(m, segments, o, first, exclude_self)


@operator("minibatch_discrimination_bwd(Tensor h, Tensor m, Tensor? segments, Tensor(a!) dm, int first, str backend)")
def _backward(h: Tensor, m: Tensor, segments: Tensor | None, dm: Tensor, first: int, backend: str) -> None:
    target = _target(dm)
    _kernels(backend).backward(stored(h).contiguous(), m, segments, target, first)
    copy_back(target, dm)


@operator(
    "minibatch_discrimination_bwd_bwd(Tensor w, Tensor h, Tensor m, Tensor? segments, Tensor(a!)? by_h,"
    " Tensor(b!)? by_m, int first, str backend)"
)
def _double_backward(
    w: Tensor,
    h: Tensor,
    m: Tensor,
    segments: Tensor | None,
    by_h: Tensor | None,
    by_m: Tensor | None,
    first: int,
    backend: str,
) -> None:
    targets = _target(by_h), _target(by_m)
    _kernels(backend).double_backward(stored(w).contiguous(), stored(h).contiguous(), m, segments, *targets, first)
    copy_back(targets[0], by_h)
    copy_back(targets[1], by_m)


@cache
def _kernels(backend: str) -> Any:
    if backend == "triton":
        from fastgan.ops.minibatch_discrimination import triton_kernels  # Triton is optional

        return triton_kernels
    return native_kernels.Native(backend)


def packed(everyone: Tensor, backend: str) -> Tensor:
    """Arrange m for the kernels. A GPU needs a tile of samples to be contiguous; on a CPU, each task packs its own."""
    everyone = stored(everyone)
    return everyone.contiguous() if backend == "cpu" else everyone.permute(1, 2, 0).contiguous()  # (B, C, N)


def _target(output: Tensor | None) -> Tensor | None:
    """Return the tensor that a kernel writes: the output itself, or a contiguous buffer in its place."""
    if output is None or output.is_contiguous():
        return output
    return torch.empty_like(output, memory_format=torch.contiguous_format)


class _Discrimination(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, m: Tensor, segments: Tensor | None, exclude_self: bool, group: Group | None, backend: str
    ) -> Tensor:
        everyone = packed(gather(m, group), backend)
        o = m.new_empty(m.shape[:2])
        run: Any = _forward if is_eager(m) else traced("minibatch_discrimination_fwd")
        run(everyone, segments, o, first_row(len(m), group), exclude_self, backend)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(m, everyone, segments)
        ctx.group, ctx.backend = group, backend
        return o

    @staticmethod
    def backward(ctx: Any, h: Tensor | None) -> tuple[Tensor | None, ...]:
        if h is None:
            return (None,) * 5
        everyones_h = gather(h, ctx.group)
        # Without create_graph the backward needs no graph of its own.
        run: Any = _DiscriminationBackward.apply if torch.is_grad_enabled() else _run_backward
        return run(h, everyones_h, *ctx.saved_tensors, ctx.group, ctx.backend), None, None, None, None


def _run_backward(
    h: Tensor,
    everyones_h: Tensor,
    m: Tensor,
    everyone: Tensor,
    segments: Tensor | None,
    group: Group | None,
    backend: str,
) -> Tensor:
    dm = torch.empty_like(m)
    run: Any = _backward if is_eager(h) else traced("minibatch_discrimination_bwd")
    run(everyones_h, everyone, segments, dm, first_row(len(m), group), backend)
    return dm


class _DiscriminationBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*arguments[:5])
        ctx.group, ctx.backend = arguments[5:]
        return _run_backward(*arguments)

    @staticmethod
    def backward(ctx: Any, w: Tensor | None) -> tuple[Tensor | None, ...]:
        h, everyones_h, m, everyone, segments = ctx.saved_tensors
        needs_h, _, needs_m = ctx.needs_input_grad[:3]
        if w is None or not (needs_h or needs_m):
            return (None,) * 7
        if torch.is_grad_enabled():
            results = _double_backward_to_any_order(w, h, m, segments, ctx.group)
            return results[0], None, results[1], None, None, None, None
        by_h = torch.empty_like(h) if needs_h else None
        by_m = torch.empty_like(m) if needs_m else None
        run: Any = _double_backward if is_eager(w) else traced("minibatch_discrimination_bwd_bwd")
        first = first_row(len(m), ctx.group)
        run(gather(w, ctx.group), everyones_h, everyone, segments, by_h, by_m, first, ctx.backend)
        return by_h, None, by_m, None, None, None, None


def _double_backward_to_any_order(
    w: Tensor, h: Tensor, m: Tensor, segments: Tensor | None, group: Group | None
) -> list[Tensor | None]:
    def discriminated(m: Tensor) -> Tensor:
        rows = m.to(accumulation_dtype(m.dtype))
        everyone, first = differentiable_gather(rows, group), first_row(len(m), group)
        # A sample's distance from itself is constant.
        return reference.minibatch_discrimination(rows, everyone, first, segments, True).to(m.dtype)

    return double_backward(gradients(discriminated), [h, m], [w])


def discriminate(
    activations: Tensor, segments: Tensor | None, exclude_self: bool, group: Group | None, backend: str
) -> Tensor:
    """Run the op on the chosen backend, without argument checks."""
    segments = None if segments is None else gather(segments.long(), group)
    if backend == "reference":
        first = first_row(len(activations), group)
        everyone = differentiable_gather(activations, group)
        return reference.minibatch_discrimination(activations, everyone, first, segments, exclude_self)
    result: Tensor = _Discrimination.apply(activations, segments, exclude_self, group, backend)
    return result
