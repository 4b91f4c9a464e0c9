"""The operators of normalisation, their implementations a backend, and the derivatives up to the second."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastgan import backends
from fastgan.ops.inputs_only import markable, needed
from fastgan.ops.library import LIBRARY, is_eager, last_order
from fastgan.ops.norm import native_kernels
from fastgan.ops.norm.layout import Layout, accumulation_dtype

# All write into tensors that they are given: an operator cannot return a tensor that may be absent.
LIBRARY.define(
    "norm_fwd(Tensor x, Tensor? weight, Tensor? bias, Tensor(a!) y, Tensor(b!) mean, Tensor(c!) rstd,"
    " int[] layout, float eps, str backend) -> ()"
)
LIBRARY.define(
    "norm_bwd(Tensor dy, Tensor x, Tensor mean, Tensor rstd, Tensor? weight,"
    " Tensor(a!)? dx, Tensor(b!)? dweight, Tensor(c!)? dbias, int[] layout, str backend) -> ()"
)
LIBRARY.define(
    "norm_bwd_bwd(Tensor? h, Tensor? h_weight, Tensor? h_bias, Tensor dy, Tensor x, Tensor mean, Tensor rstd,"
    " Tensor? weight, Tensor(a!)? by_dy, Tensor(b!)? by_x, Tensor(c!)? by_weight, int[] layout, str backend) -> ()"
)

_DTYPES = frozenset({torch.float32, torch.float64, torch.float16, torch.bfloat16})
for _op in ("layer_norm", "group_norm", "instance_norm"):
    backends.register(_op, dict.fromkeys(("reference", "cpu", "triton"), _DTYPES))


@torch.library.impl(LIBRARY, "norm_fwd", "CompositeExplicitAutograd")
def _forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    y: Tensor,
    mean: Tensor,
    rstd: Tensor,
    layout: Sequence[int],
    eps: float,
    backend: str,
) -> None:
    target = _target(y, x.dtype)
    assert target is not None
    affine = _operand(weight, mean.dtype), _operand(bias, mean.dtype)
    _kernels(backend).forward(x.contiguous(), *affine, target, mean, rstd, Layout(*layout), eps)
    _copy_back(target, y)


@torch.library.impl(LIBRARY, "norm_bwd", "CompositeExplicitAutograd")
def _backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    dx: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
    layout: Sequence[int],
    backend: str,
) -> None:
    acc = mean.dtype
    targets = _target(dx, x.dtype), _target(dweight, acc), _target(dbias, acc)
    operands = dy.contiguous(), x.contiguous(), mean, rstd, _operand(weight, acc)
    _kernels(backend).backward(*operands, *targets, Layout(*layout))
    for target, output in zip(targets, (dx, dweight, dbias), strict=True):
        _copy_back(target, output)


@torch.library.impl(LIBRARY, "norm_bwd_bwd", "CompositeExplicitAutograd")
def _double_backward(
    h: Tensor | None,
    h_weight: Tensor | None,
    h_bias: Tensor | None,
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    by_dy: Tensor | None,
    by_x: Tensor | None,
    by_weight: Tensor | None,
    layout: Sequence[int],
    backend: str,
) -> None:
    acc = mean.dtype
    targets = _target(by_dy, x.dtype), _target(by_x, x.dtype), _target(by_weight, acc)
    grads = _operand(h, x.dtype), _operand(h_weight, acc), _operand(h_bias, acc)
    operands = dy.contiguous(), x.contiguous(), mean, rstd, _operand(weight, acc)
    _kernels(backend).double_backward(*grads, *operands, *targets, Layout(*layout))
    for target, output in zip(targets, (by_dy, by_x, by_weight), strict=True):
        _copy_back(target, output)


def _nothing(*arguments: Any) -> None:
    return None


for _operator in ("norm_fwd", "norm_bwd", "norm_bwd_bwd"):
    torch.library.register_fake(f"fastgan::{_operator}", _nothing, lib=LIBRARY)


def _kernels(backend: str) -> Any:
    if backend == "triton":
        from fastgan.ops.norm import triton_kernels  # Triton is optional

        return triton_kernels
    return native_kernels


def _operand(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype).contiguous()


def _target(output: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """What a kernel writes: the output, or a contiguous stand-in of the kernel's dtype."""
    if output is None or (output.dtype == dtype and output.is_contiguous()):
        return output
    return torch.empty_like(output, dtype=dtype, memory_format=torch.contiguous_format)


def _copy_back(target: Tensor | None, output: Tensor | None) -> None:
    if target is not None and output is not None and target is not output:
        output.copy_(target)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        layout: Layout,
        eps: float,
        backend: str,
    ) -> Tensor:
        y = torch.empty_like(x)
        statistics = [torch.empty(layout.rows, dtype=accumulation_dtype(x.dtype), device=x.device) for _ in range(2)]
        run: Any = _forward if is_eager(x) else torch.ops.fastgan.norm_fwd
        run(x, weight, bias, y, *statistics, layout, eps, backend)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, *statistics, weight)
        ctx.bias = None if bias is None else (bias.shape, bias.dtype)
        ctx.layout, ctx.backend = layout, backend
        markable(ctx)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        wanted = needed(ctx)[:3]
        if dy is None or not any(wanted):
            return (None,) * 6
        # Without create_graph nothing will be asked of the backward's own graph.
        run: Any = _NormBackward.apply if torch.is_grad_enabled() else _run_backward
        grads = run(dy, *ctx.saved_tensors, wanted, ctx.bias, ctx.layout, ctx.backend)
        return *grads, None, None, None


def _run_backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    needed: tuple[bool, bool, bool],
    bias: tuple[torch.Size, torch.dtype] | None,
    layout: Layout,
    backend: str,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    dx = torch.empty_like(x) if needed[0] else None
    dweight = torch.empty_like(weight) if weight is not None and needed[1] else None
    dbias = torch.empty(bias[0], dtype=bias[1], device=x.device) if bias is not None and needed[2] else None
    run = _backward if is_eager(dy) else torch.ops.fastgan.norm_bwd
    run(dy, x, mean, rstd, weight, dx, dweight, dbias, layout, backend)
    return dx, dweight, dbias


class _NormBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*arguments[:5])
        ctx.layout, ctx.backend = arguments[-2:]
        return _run_backward(*arguments)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        dy, x, mean, rstd, weight = ctx.saved_tensors
        h, h_weight, _ = grads
        results: list[Tensor | None] = [None, None, None]
        # dbias is a function of dy alone, dweight not of the weight.
        wanted = (
            any(g is not None for g in grads),
            h is not None or h_weight is not None,
            h is not None,
        )
        needed = ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[4]
        with torch.no_grad():
            for i, like in enumerate((dy, x, weight)):
                if wanted[i] and needed[i]:
                    results[i] = torch.empty_like(like)
            if any(result is not None for result in results):
                run: Any = _double_backward if is_eager(dy) else torch.ops.fastgan.norm_bwd_bwd
                run(*grads, dy, x, mean, rstd, weight, *results, ctx.layout, ctx.backend)
        if torch.is_grad_enabled():
            message = "norm: the third derivative is not supported; use_backend('reference') has every order"
            results = last_order(message, results, [*grads, dy, x, weight])
        by_dy, by_x, by_weight = results
        return by_dy, by_x, None, None, by_weight, None, None, None, None


def normalise(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    layout: Layout,
    eps: float,
    backend: str,
) -> Tensor:
    """The op without its checks, on the backend chosen."""
    result: Tensor = _Norm.apply(x, weight, bias, layout, eps, backend)
    return result
