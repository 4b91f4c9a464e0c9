"""The operators of minibatch standard deviation, their implementation on each backend, and the derivatives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastgan import backends
from fastgan.ops.higher_orders import differentiate, double_backward
from fastgan.ops.library import accumulation_dtype, copy_back, is_eager, operator, stored, traced
from fastgan.ops.minibatch_stddev import native_kernels, reference
from fastgan.ops.minibatch_stddev.layout import Layout, layout_of, memory_format

_DTYPES = frozenset({torch.float32, torch.float64, torch.float16, torch.bfloat16})
backends.register("minibatch_stddev", dict.fromkeys(("reference", "cpu", "triton"), _DTYPES))
backends.register("minibatch_stddev_across_ranks", {"reference": _DTYPES})


@operator("minibatch_stddev_fwd(Tensor x, Tensor(a!) y, SymInt[] layout, float eps, str backend)")
def _forward(x: Tensor, y: Tensor, layout: Sequence[int], eps: float, backend: str) -> None:
    layout = Layout(*layout)
    target = _dense(y, layout)
    _kernels(backend).forward(_dense(x, layout), target, layout, eps)
    copy_back(target, y)


@operator(
    "minibatch_stddev_bwd(Tensor dy, Tensor x, Tensor(a!) dx, Tensor(b!) slope, SymInt[] layout, float eps,"
    " str backend)"
)
def _backward(
    dy: Tensor, x: Tensor, dx: Tensor, slope: Tensor, layout: Sequence[int], eps: float, backend: str
) -> None:
    layout = Layout(*layout)
    target = _dense(dx, layout)
    _kernels(backend).backward(_dense(dy, layout), _dense(x, layout), target, slope, layout, eps)
    copy_back(target, dx)


@operator(
    "minibatch_stddev_bwd_bwd(Tensor h, Tensor x, Tensor slope, Tensor(a!)? by_dy, Tensor(b!)? by_x, SymInt[] layout,"
    " float eps, str backend)"
)
def _double_backward(
    h: Tensor,
    x: Tensor,
    slope: Tensor,
    by_dy: Tensor | None,
    by_x: Tensor | None,
    layout: Sequence[int],
    eps: float,
    backend: str,
) -> None:
    layout = Layout(*layout)
    targets = [None if t is None else _dense(t, layout) for t in (by_dy, by_x)]
    _kernels(backend).double_backward(_dense(h, layout), _dense(x, layout), slope, *targets, layout, eps)
    for target, output in zip(targets, (by_dy, by_x), strict=True):
        copy_back(target, output)


def _kernels(backend: str) -> Any:
    if backend == "triton":
        from fastgan.ops.minibatch_stddev import triton_kernels  # Triton is optional

        return triton_kernels
    return native_kernels


def _dense(tensor: Tensor, layout: Layout) -> Tensor:
    return stored(tensor).contiguous(memory_format=memory_format(layout, tensor.ndim))


def _empty(like: Tensor, channels: int, layout: Layout) -> Tensor:
    shape = like.shape[0], channels, *like.shape[2:]
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=memory_format(layout, like.ndim))


class _Stddev(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: Layout, eps: float, backend: str) -> Tensor:
        y = _empty(x, x.shape[1] + layout.features, layout)
        run: Any = _forward if is_eager(x) else traced("minibatch_stddev_fwd")
        run(x, y, layout, eps, backend)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x)
        ctx.layout, ctx.eps, ctx.backend = layout, eps, backend
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * 4
        # Without create_graph the backward needs no graph of its own.
        run: Any = _StddevBackward.apply if torch.is_grad_enabled() else _run_backward
        dx, _ = run(dy, *ctx.saved_tensors, ctx.layout, ctx.eps, ctx.backend)
        return dx, None, None, None


def _run_backward(dy: Tensor, x: Tensor, layout: Layout, eps: float, backend: str) -> tuple[Tensor, Tensor]:
    dx = _empty(x, x.shape[1], layout)
    slope = torch.empty(layout.groups, layout.features, dtype=accumulation_dtype(x.dtype), device=x.device)
    run: Any = _backward if is_eager(dy) else traced("minibatch_stddev_bwd")
    run(dy, x, dx, slope, layout, eps, backend)
    return dx, slope


class _StddevBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dy: Tensor, x: Tensor, layout: Layout, eps: float, backend: str) -> tuple[Tensor, Tensor]:
        # The second derivative needs only the slope from dy. The slope is an output, so its graph leads to dy.
        dx, slope = _run_backward(dy, x, layout, eps, backend)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, slope)
        ctx.layout, ctx.eps, ctx.backend = layout, eps, backend
        return dx, slope

    @staticmethod
    def backward(ctx: Any, h: Tensor | None, k: Tensor | None) -> tuple[Tensor | None, ...]:
        """``k`` is the gradient of the slopes. Only a third derivative produces it."""
        x, slope = ctx.saved_tensors
        layout: Layout = ctx.layout
        results: list[Tensor | None] = [None, None]
        if h is not None and torch.is_grad_enabled():
            results = _double_backward_to_any_order(h, x, slope, layout, ctx.eps)
        elif h is not None and any(ctx.needs_input_grad):
            for i, channels in enumerate((x.shape[1] + layout.features, x.shape[1])):
                if ctx.needs_input_grad[i]:
                    results[i] = _empty(x, channels, layout)
            run: Any = _double_backward if is_eager(h) else traced("minibatch_stddev_bwd_bwd")
            run(h, x, slope, *results, layout, ctx.eps, ctx.backend)
        if k is not None and ctx.needs_input_grad[0]:
            statistics = (k / layout.values).repeat(layout.size, 1)  # (N, F)
            by_slope = reference.append(torch.zeros_like(x), statistics)
            results[0] = by_slope if results[0] is None else results[0] + by_slope
        return *results, None, None, None


def _double_backward_to_any_order(
    h: Tensor, x: Tensor, slope: Tensor, layout: Layout, eps: float
) -> list[Tensor | None]:
    """Differentiate dx = (dy at the values) + (ds / dx)^T (slope * values), with s the statistics (M, F)."""

    def backward(by_statistics: Tensor, x: Tensor) -> list[Tensor | None]:
        return differentiate([reference.statistics(x, layout.size, layout.features, eps)], [by_statistics], [x])

    by_statistics = slope * layout.values
    tangents, by_x = double_backward(backward, [by_statistics, x], [h])
    by_dy = None if tangents is None else reference.append(h, tangents.repeat(layout.size, 1))
    return [by_dy, by_x]


def append_stddev(x: Tensor, size: int, num_channels: int, eps: float, backend: str) -> Tensor:
    """Run the op on the chosen backend, without argument checks."""
    result: Tensor = _Stddev.apply(x, layout_of(x, size, num_channels), eps, backend)
    return result
