"""The operators of bias_act, their implementation on each backend, and the derivatives."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import inf
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgan import backends
from fastgan.ops.bias_act import native_kernels, reference
from fastgan.ops.bias_act.layout import (
    DTYPES,
    PIECEWISE,
    UNFUSED,
    Layout,
    Options,
    bytes_of_bits,
    is_dense,
    layout_of,
)
from fastgan.ops.bias_act.small import LEAST_SMOOTH, is_small
from fastgan.ops.filled import mark_base
from fastgan.ops.higher_orders import double_backward, gradients
from fastgan.ops.library import accumulation_dtype, is_eager, operator, stored, traced
from fastgan.ops.needed import needed
from fastgan.torch_private import apply

# The kernel functions and their tensor arguments, which come before the layout and the options. All write into tensors
# that the caller allocates. All these tensors have the strides of the input.
_OPERATORS = {
    "piecewise_forward": "Tensor x, Tensor? bias, Tensor(a!) y, Tensor(b!)? signs, Tensor(c!)? inside",
    "piecewise_apply": "Tensor? g, Tensor? bias, Tensor? signs, Tensor? inside, Tensor(a!)? out, Tensor(b!)? sums",
    "smooth_forward": "Tensor x, Tensor? bias, Tensor(a!) y",
    "smooth_backward": "Tensor dy, Tensor x, Tensor? bias, Tensor(a!)? dx, Tensor(b!)? dbias",
    "smooth_double_backward": "Tensor? h, Tensor? h_bias, Tensor dy, Tensor x, Tensor? bias, Tensor(a!)? by_dy,"
    " Tensor(b!)? by_x, Tensor(c!)? by_bias",
}
_OPTIONS = "SymInt[] layout, str activation, float negative_slope, float gain, float clamp, str backend"

backends.register("bias_act", dict.fromkeys(("reference", "cpu", "triton"), frozenset(DTYPES)))
backends.register("bias_act_unfused", {"reference": frozenset(DTYPES)})


def _kernels(backend: str) -> Any:
    if backend == "triton":
        from fastgan.ops.bias_act import triton_kernels  # Triton is optional

        return triton_kernels
    return native_kernels


def _implementation(name: str, *arguments: Any) -> None:
    *tensors, layout, activation, negative_slope, gain, clamp, backend = arguments
    options = Options(activation, negative_slope, gain, clamp)
    getattr(_kernels(backend), name)(*tensors, Layout(*layout), options)


for _name, _tensors in _OPERATORS.items():
    operator(f"bias_act_{_name}({_tensors}, {_OPTIONS})")(partial(_implementation, _name))


class _Call(NamedTuple):
    """The metadata of a call that its derivatives need."""

    shape: torch.Size
    stride: tuple[int, ...]  # strides of the dense tensors that the kernels see
    dtype: torch.dtype
    bias_dtype: torch.dtype | None
    dim: int
    layout: Layout
    options: Options
    backend: str

    def run(self, name: str, eager: bool, *tensors: Tensor | None) -> None:
        if eager:
            getattr(_kernels(self.backend), name)(*tensors, self.layout, self.options)
        else:
            traced(f"bias_act_{name}")(*tensors, self.layout, *self.options, self.backend)

    def operand(self, bias: Tensor | None) -> Tensor | None:
        return None if bias is None else bias.to(accumulation_dtype(self.dtype)).contiguous()

    def in_order(self, tensor: Tensor | None) -> Tensor | None:
        """Return the tensor, or a copy with the strides and dtype that the kernels expect."""
        if tensor is None:
            return None
        tensor = stored(tensor)
        if tensor.stride() == self.stride and tensor.dtype == self.dtype:
            return tensor
        return self.empty(tensor.device).copy_(tensor)

    def empty(self, device: torch.device) -> Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=device)

    def empty_sums(self, device: torch.device) -> Tensor:
        return torch.empty(self.layout.channels, dtype=accumulation_dtype(self.dtype), device=device)

    def as_bias(self, sums: Tensor | None) -> Tensor | None:
        return None if sums is None or self.bias_dtype is None else sums.to(self.bias_dtype)


def _call(x: Tensor, bias: Tensor | None, dim: int, options: Options, backend: str) -> tuple[_Call, bool]:
    """Return the metadata of the call, and whether x is dense."""
    dense = is_dense(x) and stored(x) is x
    like = x if dense else torch.empty_like(x, device="meta")  # the strides of its dense copy
    bias_dtype = None if bias is None else bias.dtype
    layout = layout_of(like, None if bias is None else dim)
    return _Call(x.shape, like.stride(), x.dtype, bias_dtype, dim, layout, options, backend), dense


def activate(
    x: Tensor, bias: Tensor | None, dim: int, options: Options, inplace: bool = False, backend: str | None = None
) -> Tensor:
    """Run bias_act without argument checks. ``dim`` must not be negative."""
    if options.activation in UNFUSED:
        backends.select("bias_act_unfused", x.device, x.dtype, backend)
        return reference.bias_act(x, bias, dim, options, inplace)
    chosen = backends.select("bias_act", x.device, x.dtype, backend)
    small = options.activation not in PIECEWISE and backend in (None, "auto") and is_small(x, LEAST_SMOOTH)
    if chosen == "reference" or x.numel() == 0 or small:
        return reference.bias_act(x, bias, dim, options, inplace)
    call, dense = _call(x, bias, dim, options, chosen)
    if not torch.is_grad_enabled() or not (x.requires_grad or (bias is not None and bias.requires_grad)):
        return _forward(x, bias, call, dense, inplace)
    if options.activation in PIECEWISE:
        y: Tensor = apply(_Piecewise, x, bias, call, dense, inplace)
        if inplace and options.activation != "linear":
            mark_base(x)
    elif inplace and not _saves_result(options):
        y = x.copy_(apply(_Smooth, x.clone(), bias, call, True, False))
    else:
        y = apply(_Smooth, x, bias, call, dense, inplace)
    return y


def _forward(x: Tensor, bias: Tensor | None, call: _Call, dense: bool, inplace: bool, *bits: Tensor | None) -> Tensor:
    eager = is_eager(x)
    source = x if dense else call.empty(x.device).copy_(x)
    y = source if inplace and eager else torch.empty_like(source)
    if call.options.activation in PIECEWISE:
        call.run("piecewise_forward", eager, source, call.operand(bias), y, *(bits or (None, None)))
    else:
        call.run("smooth_forward", eager, source, call.operand(bias), y)
    if inplace and y is not x:
        x.copy_(y)
        return x  # copy_ returns the same tensor, but torch.compile treats it as another
    return y


class _Piecewise(torch.autograd.Function):
    piecewise_affine = True

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, call: _Call, dense: bool, inplace: bool) -> Tensor:
        if inplace:
            ctx.mark_dirty(x)
        size = bytes_of_bits(x.numel())
        signs, inside = (
            torch.empty(size, dtype=torch.uint8, device=x.device) if kept else None
            for kept in (call.options.activation != "linear", call.options.clamp != inf)
        )
        y = _forward(x, bias, call, dense, inplace, signs, inside)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(signs, inside)
        ctx.call = call
        ctx.fills_zeros = () if signs is None else (0,) if bias is None else (0, 1)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        wanted = needed(ctx)[:2]
        if dy is None or not any(wanted):
            return (None,) * 5
        run: Any = partial(apply, _Slopes) if torch.is_grad_enabled() else _times_slopes
        return *run(dy, None, *ctx.saved_tensors, ctx.call, wanted), None, None, None


def _times_slopes(
    g: Tensor | None,
    k: Tensor | None,
    signs: Tensor | None,
    inside: Tensor | None,
    call: _Call,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None]:
    given = g if g is not None else k
    assert given is not None
    out = call.empty(given.device) if wanted[0] else None
    sums = call.empty_sums(given.device) if wanted[1] else None
    call.run("piecewise_apply", is_eager(given), call.in_order(g), call.operand(k), signs, inside, out, sums)
    return out, call.as_bias(sums)


class _Slopes(torch.autograd.Function):
    """Map (g, k) to S (g + k) and its sum over each channel, S being the slopes. The map is its own transpose."""

    @staticmethod
    def forward(
        ctx: Any,
        g: Tensor | None,
        k: Tensor | None,
        signs: Tensor | None,
        inside: Tensor | None,
        call: _Call,
        wanted: Sequence[bool],
    ) -> tuple[Tensor | None, Tensor | None]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(signs, inside)
        ctx.call = call
        return _times_slopes(g, k, signs, inside, call, wanted)

    @staticmethod
    def backward(ctx: Any, h: Tensor | None, h_sums: Tensor | None) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[:2]
        if (h is None and h_sums is None) or not any(wanted):
            return (None,) * 6
        run: Any = partial(apply, _Slopes) if torch.is_grad_enabled() else _times_slopes
        return *run(h, h_sums, *ctx.saved_tensors, ctx.call, wanted), None, None, None, None


def _saves_result(options: Options) -> bool:
    """Return whether the derivatives can be computed from the result."""
    return options.activation in ("tanh", "sigmoid") and options.gain == 1 and options.clamp == inf


class _Smooth(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, call: _Call, dense: bool, inplace: bool) -> Tensor:
        if inplace:
            ctx.mark_dirty(x)
        y = _forward(x, bias, call, dense, inplace)
        ctx.set_materialize_grads(False)
        if _saves_result(call.options):
            ctx.save_for_backward(y, None)
            ctx.call = call._replace(options=call.options._replace(activation=f"{call.options.activation}_of_y"))
        else:
            ctx.save_for_backward(x, bias)
            ctx.call = call
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        wanted = needed(ctx)[:2]
        if dy is None or not any(wanted):
            return (None,) * 5
        run: Any = partial(apply, _SmoothBackward) if torch.is_grad_enabled() else _run_smooth_backward
        return *run(dy, *ctx.saved_tensors, ctx.call, wanted), None, None, None


def _run_smooth_backward(
    dy: Tensor, x: Tensor, bias: Tensor | None, call: _Call, wanted: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    dx = call.empty(dy.device) if wanted[0] else None
    dbias = call.empty_sums(dy.device) if wanted[1] else None
    operands = call.in_order(dy), call.in_order(x), call.operand(bias)
    call.run("smooth_backward", is_eager(dy), *operands, dx, dbias)
    return dx, call.as_bias(dbias)


class _SmoothBackward(torch.autograd.Function):
    """The backward of a smooth activation. ``x`` is the input, or the result if the forward saved that."""

    @staticmethod
    def forward(
        ctx: Any, dy: Tensor, x: Tensor, bias: Tensor | None, call: _Call, wanted: Sequence[bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(dy, x, bias)
        ctx.call = call
        return _run_smooth_backward(dy, x, bias, call, wanted)

    @staticmethod
    def backward(ctx: Any, h: Tensor | None, h_bias: Tensor | None) -> tuple[Tensor | None, ...]:
        dy, x, bias = ctx.saved_tensors
        call: _Call = ctx.call
        if torch.is_grad_enabled():
            backward = _smooth_backward_of_result if call.options.activation.endswith("_of_y") else _smooth_backward
            results = double_backward(partial(backward, call), [dy, x, bias], [h, h_bias])
        elif h is not None or h_bias is not None:
            results = _run_smooth_double_backward(h, h_bias, dy, x, bias, call, ctx.needs_input_grad[:3])
        else:
            results = [None, None, None]
        return *results, None, None


def _smooth_backward(call: _Call, dy: Tensor, x: Tensor, bias: Tensor | None) -> Sequence[Tensor | None]:
    """Compute the backward with PyTorch operations."""
    acc = accumulation_dtype(call.dtype)

    def activated(x: Tensor, bias: Tensor | None) -> Tensor:
        return reference.bias_act(x.to(acc), None if bias is None else bias.to(acc), call.dim, call.options)

    return gradients(activated)(dy.to(acc), x, bias)


def _smooth_backward_of_result(call: _Call, dy: Tensor, y: Tensor, bias: None) -> Sequence[Tensor | None]:
    """Compute the backward from the saved result y: tanh' = 1 - y^2, sigmoid' = y (1 - y)."""
    y = y.to(accumulation_dtype(call.dtype))
    slope = 1 - y.square() if call.options.activation.startswith("tanh") else y * (1 - y)
    dx = dy * slope  # (*S)
    sums = None if call.bias_dtype is None else dx.sum([d for d in range(dx.ndim) if d != call.dim])
    return dx.to(call.dtype), call.as_bias(sums)


def _run_smooth_double_backward(
    h: Tensor | None,
    h_bias: Tensor | None,
    dy: Tensor,
    x: Tensor,
    bias: Tensor | None,
    call: _Call,
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    by_dy, by_x = (call.empty(dy.device) if want else None for want in wanted[:2])
    by_bias = call.empty_sums(dy.device) if wanted[2] else None
    if any(wanted):
        grads = call.in_order(h), call.operand(h_bias)
        operands = call.in_order(dy), call.in_order(x), call.operand(bias)
        call.run("smooth_double_backward", is_eager(dy), *grads, *operands, by_dy, by_x, by_bias)
    return [by_dy, by_x, call.as_bias(by_bias)]
