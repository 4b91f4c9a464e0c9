"""Rules for matrix products and linear layers: linear in one factor, plus a bias."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastgan.ops.gradient_penalty.call import Call
from fastgan.ops.gradient_penalty.layout import Ineligible, Layout, MixesSamples, aligned
from fastgan.ops.gradient_penalty.table import functions


def _linear(call: Call, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Layout:
    call.require_input(input)
    call.require_constants(weight, bias)
    call.add_argument(bias)
    return call.layout_before(input, 1)


def _conv(n: int) -> Callable[..., Layout]:
    def rule(
        call: Call,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        fifth: Any = 1,
        groups: int = 1,
        *rest: Any,
        **named: Any,
    ) -> Layout:
        call.require_input(input)
        call.require_constants(weight, bias)
        call.add_argument(bias, trailing=n)
        layout = call.layout_before(input, n)
        if input.ndim == n + 2 and layout.dim == 0:
            return layout
        return _of_channels(layout, input.shape[-n - 1], call.result.shape[-n - 1], groups)

    return rule


def _of_channels(layout: Layout, channels: int, results: int, groups: int) -> Layout:
    """Return the layout if the samples lie along the channels and each has its own groups."""
    of_group = channels // groups
    if layout.inner % of_group:
        raise MixesSamples
    return layout._replace(inner=layout.inner // of_group * (results // groups))


def _matmul(call: Call, input: Any, other: Any) -> Layout:
    return _product_layout(call, input, other, call.result.ndim)


def _reversed_matmul(call: Call, input: Any, other: Any) -> Layout:
    return _matmul(call, other, input)


def _product_layout(call: Call, left: Tensor, right: Tensor, ndim: int) -> Layout:
    """Return the layout of ``left @ right``, which has ``ndim`` dimensions."""
    if call.layout(left) is not None:
        call.require_constants(right)
        layout = call.layout_before(left, 1)
        after = layout.dim - left.ndim  # from the right
        return layout._replace(dim=ndim + after + (1 if right.ndim == 1 else 0))
    layout = call.layout_of(right)
    after = layout.dim - right.ndim
    if right.ndim == 1 or after == -2:
        raise MixesSamples
    return layout._replace(dim=ndim + after + (1 if left.ndim == 1 and after < -2 else 0))


def _sum_and_product(
    call: Call, input: Tensor, left: Tensor, right: Tensor, *, beta: float = 1, alpha: float = 1
) -> Layout:
    return _sum_of(call, input, left, right, beta, call.result.ndim)


def _sum_and_summed_product(
    call: Call, input: Tensor, left: Tensor, right: Tensor, *, beta: float = 1, alpha: float = 1
) -> Layout:
    return _sum_of(call, input, left, right, beta, 3)


def _sum_of(call: Call, input: Tensor, left: Tensor, right: Tensor, beta: float, ndim: int) -> Layout:
    product = call.layout(left) is not None or call.layout(right) is not None
    if call.layout(left) is not None:
        call.require_constants(right)
    if not product:
        call.add_constant(call.evaluate_at_zero())
        return call.broadcast_layout(input)
    if call.layout(input) is None:
        call.add_constant(input * beta)
    layout = _product_layout(call, left, right, ndim)
    layout = layout._replace(dim=layout.dim - ndim + call.result.ndim)
    if layout.dim < 0:
        raise MixesSamples
    if call.layout(input) is not None:
        return aligned([(layout, call.result), (call.layout_of(input), input)], call.result.shape)
    return layout


def _einsum(call: Call, equation: Any, *operands: Any) -> Layout:
    if not isinstance(equation, str):
        raise Ineligible("was called with lists of dimensions; pass an equation")
    given = operands[0] if len(operands) == 1 and isinstance(operands[0], list | tuple) else operands
    made = [i for i, operand in enumerate(given) if call.layout(operand) is not None]
    if len(made) != 1:
        raise Ineligible("multiplies a tensor that depends on the input by another that does")
    input = given[made[0]]
    layout = call.layout_of(input)
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if not arrow:
        output = "".join(sorted(label for label in set(inputs) - {",", "."} if inputs.count(label) == 1))
        output = ("..." if "..." in inputs else "") + output
    label = _labels(terms[made[0]], input.ndim)[layout.dim]
    results = _labels(output, call.result.ndim)
    if results.count(label) != 1 or _labels(terms[made[0]], input.ndim).count(label) != 1:
        raise MixesSamples
    dim = results.index(label)
    if call.result.shape[dim] != input.shape[layout.dim]:
        raise MixesSamples
    return layout._replace(dim=dim)


def _labels(term: str, ndim: int) -> list[str | int]:
    """Return one label per dimension. Dimensions of an ellipsis get negative numbers, counted from the right."""
    before, dots, after = term.partition("...")
    hidden = ndim - len(before) - len(after) if dots else 0
    return [*before, *range(-hidden, 0), *after]


def _tensordot(call: Call, a: Tensor, b: Tensor, dims: Any = 2, out: None = None) -> Layout:
    if isinstance(dims, int):
        dims = list(range(a.ndim - dims, a.ndim)), list(range(dims))
    summed = []
    for tensor, given in zip((a, b), dims, strict=True):
        summed.append([dim % tensor.ndim for dim in ([given] if isinstance(given, int) else given)])
    which = 0 if call.layout(a) is not None else 1
    input, other = (a, b) if which == 0 else (b, a)
    call.require_input(input)
    call.require_constants(other)
    layout = call.layout_of(input)
    if layout.dim in summed[which]:
        raise MixesSamples
    left = [dim for dim in range(input.ndim) if dim not in summed[which]]
    return layout._replace(dim=left.index(layout.dim) + (0 if which == 0 else other.ndim - len(summed[0])))


def _inner(call: Call, input: Tensor, other: Tensor) -> Layout:
    if input.ndim == 0 or other.ndim == 0:
        return _factor(call, input, other)
    return _tensordot(call, input, other, ([-1], [-1]))


def _factor(call: Call, input: Tensor, other: Tensor) -> Layout:
    """Return the layout of a product of elements, of which only one may depend on the input."""
    if call.layout(input) is not None:
        call.require_constants(other)
    return call.broadcast_layout(input, other)


def _chain(call: Call, *matrices: Any) -> Layout:
    """multi_dot and chain_matmul. The outer dimension of the first or last factor may hold the samples."""
    given = matrices[0] if isinstance(matrices[0], list | tuple) else matrices
    made = [i for i, factor in enumerate(given) if call.layout(factor) is not None]
    if len(made) != 1:
        raise Ineligible("multiplies a tensor that depends on the input by another that does")
    layout = call.layout_of(given[made[0]])
    if made[0] == 0 and layout.dim == 0 and given[0].ndim == 2:
        return layout
    if made[0] == len(given) - 1 and layout.dim == 1:
        return layout._replace(dim=call.result.ndim - 1)
    raise MixesSamples


def _vecdot(call: Call, x: Tensor, y: Tensor, *, dim: int = -1) -> Layout:
    if call.layout(x) is not None:
        call.require_constants(y)
    input = y if call.layout(x) is None else x
    shape = torch.broadcast_shapes(x.shape, y.shape)
    layout = aligned([(call.layout_of(input), input)], shape)
    summed = dim % len(shape)
    if summed == layout.dim:
        raise MixesSamples
    return layout._replace(dim=layout.dim - (summed < layout.dim))


def _outer(call: Call, input: Tensor, other: Tensor) -> Layout:
    if call.layout(input) is not None:
        call.require_constants(other)
        return call.layout_of(input)
    return call.layout_of(other)._replace(dim=1)


def _kron(call: Call, input: Tensor, other: Tensor) -> Layout:
    if call.layout(input) is not None:
        call.require_constants(other)
    made = other if call.layout(input) is None else input
    layout = call.layout_of(made)
    dim = layout.dim + call.result.ndim - made.ndim
    times = call.result.shape[dim] // made.shape[layout.dim]
    if made is input:
        return layout._replace(dim=dim, inner=layout.inner * times)
    return layout._replace(dim=dim, outer=layout.outer * times)


def _cross(call: Call, input: Tensor, other: Tensor, dim: int | None = None) -> Layout:
    layout = _factor(call, input, other)
    if layout.dim == (call.result.shape.index(3) if dim is None else dim % call.result.ndim):
        raise MixesSamples
    return layout


def _linalg_cross(call: Call, input: Tensor, other: Tensor, *, dim: int = -1) -> Layout:
    return _cross(call, input, other, dim)


def _bilinear(call: Call, input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None) -> Layout:
    call.require_constants(weight, bias)
    if call.layout(input1) is not None:
        call.require_constants(input2)
    call.add_argument(bias)
    return call.layout_before(input1 if call.layout(input1) is not None else input2, 1)


PRODUCTS: dict[Any, Callable[..., Any]] = {
    F.linear: _linear,
    **{function: _conv(n) for n in (1, 2, 3) for function in functions(f"conv{n}d", f"conv_transpose{n}d")},
    **dict.fromkeys(functions("matmul", "__matmul__", "mm", "bmm", "mv"), _matmul),
    **dict.fromkeys(functions("__rmatmul__"), _reversed_matmul),
    **dict.fromkeys(functions("addmm", "addmv", "baddbmm"), _sum_and_product),
    **dict.fromkeys(functions("addbmm"), _sum_and_summed_product),
    torch.einsum: _einsum,
    torch.tensordot: _tensordot,
    **dict.fromkeys(functions("inner"), _inner),
    **dict.fromkeys(functions("multi_dot", "chain_matmul"), _chain),
    **dict.fromkeys(functions("vecdot"), _vecdot),
    **dict.fromkeys(functions("outer", "ger"), _outer),
    **dict.fromkeys(functions("kron"), _kron),
    **dict.fromkeys((torch.cross, Tensor.cross), _cross),
    torch.linalg.cross: _linalg_cross,
    **dict.fromkeys({F.bilinear, torch.bilinear}, _bilinear),
}
