"""The operators of normalization, their implementation on each backend, and the derivatives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgan import backends
from fastgan.ops.higher_orders import double_backward, gradients
from fastgan.ops.library import accumulation_dtype, is_eager, operator, stored, traced
from fastgan.ops.needed import needed
from fastgan.ops.norm import native_kernels, reference
from fastgan.ops.norm.layout import Backward, DoubleBackward, Forward, Layout, channels_last

# The operators write into tensors that the caller allocates, because an operator cannot return an optional tensor.

_DTYPES = frozenset({torch.float32, torch.float64, torch.float16, torch.bfloat16})
for _op in ("layer_norm", "group_norm", "instance_norm", "batch_norm"):
    backends.register(_op, dict.fromkeys(("reference", "cpu", "triton"), _DTYPES))

# Tensors with the dtype and shape of the input. All others have the accumulation dtype.
_OF_INPUT = {"x", "y", "dy", "dx", "h", "by_dy", "by_x"}
_WRITTEN = {"y", "statistics", "dx", "dweight", "dbias", "by_dy", "by_x", "by_weight"}


@operator(
    "norm_fwd(Tensor x, Tensor? weight, Tensor? bias, Tensor(a!) y, Tensor(b!) statistics,"
    " SymInt[] layout, float eps, str backend)"
)
def _forward(*arguments: Any) -> None:
    *tensors, layout, eps, backend = arguments
    _run("forward", Forward(*tensors), layout, backend, eps)


@operator(
    "norm_bwd(Tensor dy, Tensor x, Tensor statistics, Tensor? weight,"
    " Tensor(a!)? dx, Tensor(b!)? dweight, Tensor(c!)? dbias, SymInt[] layout, str backend)"
)
def _backward(*arguments: Any) -> None:
    *tensors, layout, backend = arguments
    _run("backward", Backward(*tensors), layout, backend)


@operator(
    "norm_bwd_bwd(Tensor? h, Tensor? h_weight, Tensor? h_bias, Tensor dy, Tensor x, Tensor statistics, Tensor? weight,"
    " Tensor(a!)? by_dy, Tensor(b!)? by_x, Tensor(c!)? by_weight, SymInt[] layout, str backend)"
)
def _double_backward(*arguments: Any) -> None:
    *tensors, layout, backend = arguments
    _run("double_backward", DoubleBackward(*tensors), layout, backend)


def _run(name: str, operands: Any, layout: Any, backend: str, *options: Any) -> None:
    """Call a kernel with the operands, or with copies if it does not support their dtype or strides."""
    dtype = operands.x.dtype
    acc = accumulation_dtype(dtype)
    channels_last = layout[-1]
    taken: list[Tensor | None] = []
    stand_ins = []
    for field, tensor in zip(operands._fields, operands, strict=True):
        if tensor is not None:
            of_input = field in _OF_INPUT
            wanted = dtype if of_input else acc
            if field not in _WRITTEN:
                tensor = stored(tensor)
            if of_input and channels_last:
                tensor = tensor.movedim(1, -1)
            if tensor.dtype != wanted or not tensor.is_contiguous():
                given = tensor
                if field in _WRITTEN:
                    tensor = torch.empty_like(given, dtype=wanted, memory_format=torch.contiguous_format)
                    stand_ins.append((given, tensor))
                else:
                    tensor = given.to(wanted).contiguous()
        taken.append(tensor)
    getattr(_kernels(backend), name)(operands._make(taken), Layout(*layout), *options)
    for given, stand_in in stand_ins:
        given.copy_(stand_in)


def _kernels(backend: str) -> Any:
    if backend == "triton":
        from fastgan.ops.norm import triton_kernels  # Triton is optional

        return triton_kernels
    return native_kernels


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        statistics: Tensor,
        layout: Layout,
        eps: float,
        backend: str,
    ) -> Tensor:
        y = torch.empty_like(x)
        run: Any = _forward if is_eager(x) else traced("norm_fwd")
        run(x, weight, bias, y, statistics, layout, eps, backend)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, statistics, weight)
        ctx.bias = None if bias is None else (bias.shape, bias.dtype)
        ctx.layout, ctx.eps, ctx.backend = layout, eps, backend
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        wanted = needed(ctx)[:3]
        if dy is None or not any(wanted):
            return (None,) * 7
        # Without create_graph the backward needs no graph of its own.
        arguments = dy, *ctx.saved_tensors, wanted, ctx.bias, ctx.layout, ctx.backend
        grads = _NormBackward.apply(ctx.eps, *arguments) if torch.is_grad_enabled() else _run_backward(*arguments)
        return *grads, None, None, None, None


def _run_backward(
    dy: Tensor,
    x: Tensor,
    statistics: Tensor,
    weight: Tensor | None,
    needed: tuple[bool, bool, bool],
    bias: tuple[torch.Size, torch.dtype] | None,
    layout: Layout,
    backend: str,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    dx = torch.empty_like(x) if needed[0] else None
    dweight = torch.empty_like(weight) if weight is not None and needed[1] else None
    dbias = torch.empty(bias[0], dtype=bias[1], device=x.device) if bias is not None and needed[2] else None
    run: Any = _backward if is_eager(dy) else traced("norm_bwd")
    run(dy, x, statistics, weight, dx, dweight, dbias, layout, backend)
    return dx, dweight, dbias


class _NormBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, eps: float, *arguments: Any) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*arguments[:4])
        ctx.eps, (ctx.layout, ctx.backend) = eps, arguments[-2:]
        return _run_backward(*arguments)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        dy, x, statistics, weight = ctx.saved_tensors
        if torch.is_grad_enabled():
            by_dy, by_x, by_weight = _double_backward_to_any_order(grads, dy, x, weight, ctx.layout, ctx.eps)
            return None, by_dy, by_x, None, by_weight, *(None,) * 4
        h, h_weight, _ = grads
        results: list[Tensor | None] = [None, None, None]
        # dbias depends on dy alone, and dweight does not depend on the weight.
        wanted = (
            any(g is not None for g in grads),
            h is not None or h_weight is not None,
            h is not None,
        )
        needed = ctx.needs_input_grad[1], ctx.needs_input_grad[2], ctx.needs_input_grad[4]
        for i, like in enumerate((dy, x, weight)):
            if wanted[i] and needed[i]:
                results[i] = torch.empty_like(like)
        if any(result is not None for result in results):
            run: Any = _double_backward if is_eager(dy) else traced("norm_bwd_bwd")
            run(*grads, dy, x, statistics, weight, *results, ctx.layout, ctx.backend)
        by_dy, by_x, by_weight = results
        return None, by_dy, by_x, None, by_weight, *(None,) * 4


def _double_backward_to_any_order(
    grads: tuple[Tensor | None, ...], dy: Tensor, x: Tensor, weight: Tensor | None, layout: Layout, eps: float
) -> list[Tensor | None]:
    def normalized(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return reference.normalized_rows(x, weight, bias, layout, eps)

    # The derivatives do not depend on the value of the bias.
    bias = None if grads[2] is None else torch.zeros_like(grads[2], requires_grad=True)
    return double_backward(gradients(normalized), [dy, x, weight, bias], grads)[:3]


def statistics_of(x: Tensor, layout: Layout, count: int) -> Tensor:
    """Allocate the ``count`` statistics per row: the mean, 1 / sqrt(var + eps) and, if ``count`` is 3, the variance."""
    return torch.empty(count, layout.rows, dtype=accumulation_dtype(x.dtype), device=x.device)


def normalize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    layout: Layout,
    eps: float,
    backend: str,
    statistics: Tensor | None = None,
) -> Tensor:
    """Run the op on the chosen backend, without argument checks.

    If ``statistics`` (from `statistics_of`) is given, the forward writes the statistics there.
    """
    if not (layout.channels_last and channels_last(x)):
        x = x.contiguous()  # once, and not in each order of derivative
    if statistics is None:
        statistics = statistics_of(x, layout, 2)
    result: Tensor = _Norm.apply(x, weight, bias, statistics, layout, eps, backend)
    return result
