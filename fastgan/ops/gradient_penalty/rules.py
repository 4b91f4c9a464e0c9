"""Rules for torch functions: which constant a function adds, and the layout of the samples in its result.

A rule runs after the function, with the same arguments. It raises Ineligible if the call is not affine in the arguments
that depend on the input. It declares the added constant and returns the layout of the result. It raises MixesSamples if
no layout describes the result.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastgan.ops.bias_act import bias_act
from fastgan.ops.gradient_penalty import fused
from fastgan.ops.gradient_penalty.call import Call, bind, tensors
from fastgan.ops.gradient_penalty.layout import Ineligible, Layout
from fastgan.ops.gradient_penalty.products import PRODUCTS
from fastgan.ops.gradient_penalty.shapes import SHAPES, VIEWS_IN_PLACE, keep_shape, reduced
from fastgan.ops.gradient_penalty.spectra import SPECTRA, STFT, pad_first
from fastgan.ops.gradient_penalty.table import IN_PLACE, functions
from fastgan.ops.gradient_penalty.writes import WRITES, keep_target
from fastgan.ops.norm.evaluation import scale_and_shift


class Rule(NamedTuple):
    after: Callable[..., Any]
    before: Callable[..., None] | None = None


def _cast(call: Call, input: Tensor, *rest: Any, **named: Any) -> Layout:
    return call.layout_of(input)


def _elementwise(call: Call, input: Tensor, *rest: Any, **named: Any) -> Layout:
    """Functions that are linear, or piecewise linear through zero, in each element of the first argument."""
    call.require_constants(rest, named)
    return call.layout_of(input)


def _sum(call: Call, input: Any, other: Any, *, alpha: float = 1) -> Layout:
    if call.layout(other) is None:
        if alpha == 1:
            call.add_argument(other)
        else:
            call.add_constant(other * alpha)
    elif call.layout(input) is None:
        call.add_argument(input if call.source is None else call.source)
    return call.broadcast_layout(input, other)


def _difference(call: Call, input: Any, other: Any, *, alpha: float = 1) -> Layout:
    if call.layout(other) is None:
        call.add_constant(-other * alpha)
    elif call.layout(input) is None:
        call.add_argument(input if call.source is None else call.source)
    return call.broadcast_layout(input, other)


def _reversed_difference(call: Call, input: Any, other: Any, alpha: float = 1) -> Layout:
    return _difference(call, other, input, alpha=alpha)


def _product(call: Call, input: Any, other: Any) -> Layout:
    if call.layout(input) is not None:
        call.require_constants(other)
    return call.broadcast_layout(input, other)


def _quotient(call: Call, input: Any, other: Any, *, rounding_mode: str | None = None) -> Layout:
    call.require_constants(other)
    if rounding_mode is not None:
        raise Ineligible("rounds")
    return call.broadcast_layout(input)


def _affine(call: Call, *args: Any, **kwargs: Any) -> Layout:
    """Functions that are affine in all arguments that depend on the input."""
    given = [*tensors((args, kwargs))]
    if any(call.layout(t) is None for t in given) or any(isinstance(x, int | float) for x in args):
        call.add_constant(call.evaluate_at_zero())
    return call.broadcast_layout(*given)


def _lerp(call: Call, input: Tensor, end: Tensor, weight: Any) -> Layout:
    call.require_constants(weight)
    return _affine(call, input, end)


def _addcmul(call: Call, input: Tensor, tensor1: Tensor, tensor2: Tensor, *, value: float = 1) -> Layout:
    if call.layout(tensor1) is not None:
        call.require_constants(tensor2)
    return _affine(call, input, tensor1, tensor2)


def _addcdiv(call: Call, input: Tensor, tensor1: Tensor, tensor2: Tensor, *, value: float = 1) -> Layout:
    call.require_constants(tensor2)
    return _affine(call, input, tensor1, tensor2)


def _masked_fill(call: Call, input: Tensor, mask: Tensor, value: Any) -> Layout:
    call.require_constants(mask, value)
    if not isinstance(value, int | float) or value != 0:
        call.add_constant(call.evaluate_at_zero())
    return call.broadcast_layout(input)


def _keep_source(call: Call, *args: Any, **kwargs: Any) -> None:
    """Store the values that an in-place call is about to overwrite."""
    inplace = call.func in IN_PLACE or any(x is True for x in (*args, *kwargs.values()))
    made = [t.detach() for t in tensors((args, kwargs)) if call.layout(t) is not None]
    call.source = made[0].clone() if inplace else made[0]


def _piecewise(call: Call, *args: Any, **kwargs: Any) -> Layout:
    """Functions that are piecewise affine in each element. The constant is the result minus slope times element."""
    made = [t for t in tensors((args, kwargs)) if call.layout(t) is not None]
    if len(made) == 1:
        call.add_constant(_at_no_slope(call, made[0]))
    return call.broadcast_layout(*made)


def _at_no_slope(call: Call, made: Tensor) -> Tensor:
    def replaced(by: Tensor) -> Tensor:
        arguments = bind(lambda x: by if x is made else x, (call.args, call.kwargs))
        result: Tensor = call.func(*arguments[0], **arguments[1])
        return result

    source = call.source.expand(call.result.shape)
    leaf = source.detach().clone().requires_grad_()
    (slopes,) = torch.autograd.grad(replaced(leaf * 1).sum(), leaf)
    with torch.no_grad():
        linear = torch.where(slopes == 0, slopes, slopes * source)  # the source may be infinite
    return replaced(source.clone()) - linear


def _keep_source_of_two(call: Call, input: Tensor, *rest: Any, **named: Any) -> None:
    if any(True for _ in tensors((rest, named))):
        _keep_source(call, input, *rest, **named)


def _extremum(call: Call, input: Tensor, *rest: Any, **named: Any) -> Any:
    """max and min of two tensors, over one dimension, or over all elements."""
    if any(True for _ in tensors((rest, named))):
        return _piecewise(call, input, *rest, **named)
    return reduced(call, input, *rest, **named)


def _clamped(call: Call, input: Tensor, *bounds: Any, **named: Any) -> Layout:
    if len(bounds) + len(named) == 1 and all(isinstance(x, int | float) and x == 0 for x in (*bounds, *named.values())):
        return call.layout_of(input)
    return _piecewise(call, input, *bounds, **named)


def _require_first_power(call: Call, input: Any, exponent: Any) -> None:
    """Copy instead. The derivative of PyTorch's function is a power of the input."""
    if not isinstance(exponent, int | float) or exponent != 1 or call.func in IN_PLACE:
        raise Ineligible("is affine only for the exponent 1")
    call.func, call.args, call.kwargs = torch.clone, (input,), {}


def _keep_alias(call: Call, input: Tensor, p: float = 0.5, training: bool = False, inplace: bool = False) -> None:
    """Let the call read an alias. The gradient of the alias gives the mask."""
    call.require_input(input)
    if training and (inplace or call.func in IN_PLACE):
        raise Ineligible("is in place; use the form that is not in place")
    alias = input.view_as(input)
    call.source = input, alias
    call.args, call.kwargs = (alias, p, training, inplace), {}


def _shifted_dropout(call: Call, *args: Any) -> Layout:
    input, alias = call.source
    result = call.result
    if result is not alias:
        (slopes,) = torch.autograd.grad(result, alias, torch.ones_like(result), retain_graph=True)
        call.add_constant(result.detach() - slopes * alias.detach())
    return call.layout_of(input)


def _batch_norm(
    call: Call,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Layout:
    call.require_input(input)
    call.require_constants(weight, bias)
    if training or running_mean is None or running_var is None:
        raise Ineligible(
            "normalizes by batch statistics, which mixes the samples; call eval() to use the running statistics"
        )
    shift = scale_and_shift(running_mean, running_var, weight, bias, eps)[1]
    call.add_constant(shift.view(-1, *[1] * (input.ndim - 2)))
    return call.layout_of(input)


def _instance_norm(
    call: Call,
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Layout:
    if use_input_stats:
        raise Ineligible("divides by a deviation that depends on the input")
    return _batch_norm(call, input, running_mean, running_var, weight, bias, False, momentum, eps)


def _batch_norm_of_torch(call: Call, input: Tensor, weight: Any, bias: Any, *rest: Any) -> Layout:
    mean, variance, training, momentum, eps, _ = rest
    return _batch_norm(call, input, mean, variance, weight, bias, training, momentum, eps)


_SAME = functions(
    *("relu", "leaky_relu", "prelu", "rrelu", "hardshrink"),
    *("neg", "negative", "positive", "__neg__", "__pos__", "contiguous", "clone", "__copy__"),
    *("dropout", "dropout1d", "dropout2d", "dropout3d", "feature_dropout", "native_dropout"),
    *("tril", "triu"),
)
RULES: dict[Any, Rule] = {
    **dict.fromkeys(_SAME, Rule(_elementwise)),
    **dict.fromkeys(
        functions("to", "type", "type_as", "float", "double", "half", "bfloat16", "cpu", "cuda"), Rule(_cast)
    ),
    **dict.fromkeys(functions("add", "__add__", "__radd__", "__iadd__"), Rule(_sum, keep_target)),
    **dict.fromkeys(functions("sub", "subtract", "__sub__", "__isub__"), Rule(_difference, keep_target)),
    **dict.fromkeys(functions("rsub", "__rsub__"), Rule(_reversed_difference)),
    **dict.fromkeys(functions("mul", "multiply", "__mul__", "__rmul__", "__imul__"), Rule(_product)),
    **dict.fromkeys(
        functions("div", "divide", "true_divide", "__div__", "__truediv__", "__itruediv__", "__idiv__"), Rule(_quotient)
    ),
    **dict.fromkeys(functions("where", "complex"), Rule(_affine)),
    **dict.fromkeys(functions("lerp"), Rule(_lerp)),
    **dict.fromkeys(functions("addcmul"), Rule(_addcmul)),
    **dict.fromkeys(functions("addcdiv"), Rule(_addcdiv)),
    **dict.fromkeys(functions("masked_fill"), Rule(_masked_fill)),
    **dict.fromkeys(functions("clamp", "clip", "clamp_min", "clamp_max"), Rule(_clamped, _keep_source)),
    **dict.fromkeys(
        functions("maximum", "minimum", "fmax", "fmin", "hardtanh", "relu6", "threshold", "softshrink", "hardsigmoid"),
        Rule(_piecewise, _keep_source),
    ),
    **dict.fromkeys(functions("pow", "__pow__", "__ipow__"), Rule(_elementwise, _require_first_power)),
    **dict.fromkeys(functions("max", "min"), Rule(_extremum, _keep_source_of_two)),
    **dict.fromkeys(functions("alpha_dropout", "feature_alpha_dropout"), Rule(_shifted_dropout, _keep_alias)),
    bias_act: Rule(fused.bias_act, fused.split_bias),
    F.batch_norm: Rule(_batch_norm),
    torch.batch_norm: Rule(_batch_norm_of_torch),
    F.instance_norm: Rule(_instance_norm),
    **{function: Rule(rule) for function, rule in (PRODUCTS | SHAPES | SPECTRA).items()},
    **{function: Rule(rule, pad_first) for function, rule in STFT.items()},
    **{function: Rule(rule, keep_shape) for function, rule in VIEWS_IN_PLACE.items()},
    **{function: Rule(rule, keep_target) for function, rule in WRITES.items()},
}
