"""Elementwise operations: clamp and its like, abs, the shrinks, maximum and minimum with a constant, RReLU."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastgan.ops.bias_act.functions import leaky_relu
from fastgan.ops.piecewise.autograd import Linear, Step, is_eligible, piecewise
from fastgan.torch_private import clamp_passes_at_bound

aten: Any = torch.ops.aten
Bound = Any  # a number or a tensor, or None
Slopes = Callable[..., tuple[Tensor, ...]]


def _masked(x: Tensor, inside: Tensor) -> Tensor:
    return torch.where(inside, x, 0)


def _scaled(x: Tensor, slopes: Tensor) -> Tensor:
    return x * slopes


def _divided_by_six(x: Tensor, inside: Tensor) -> Tensor:
    return torch.where(inside, x / 6, 0)


def _chosen(x: Tensor, chosen: Tensor, equal: Tensor) -> Tensor:
    """Pass half of x where both operands are equal, because PyTorch splits the gradient there."""
    return torch.where(equal, x / 2, torch.where(chosen, x, 0))


def _drawn(x: Tensor, noise: Tensor) -> Tensor:
    return noise * x  # this order gives the result the same strides as PyTorch's


MASKED, SCALED, SIXTH, CHOSEN, DRAWN = (
    Linear(slopes, slopes) for slopes in (_masked, _scaled, _divided_by_six, _chosen, _drawn)
)


def elementwise(
    reference: Callable[..., Any], linear: Linear, slopes: Slopes, inplace: bool = False
) -> Callable[..., Any]:
    """Give one of PyTorch's functions (``reference``) the linear part that ``slopes`` finds for the same arguments."""

    filled = slopes not in (_clamp, _clamp_max, _hardsigmoid)

    def route(input: Tensor, *args: Any, **kwargs: Any) -> Any:
        over = inplace or _is_inplace(reference, args, kwargs)
        empty = slopes is _hardsigmoid  # PyTorch differentiates it only once
        if not is_eligible(input, over, empty) or not _fit(input, args) or not _fit(input, kwargs.values()):
            return reference(input, *args, **kwargs)
        if not clamp_passes_at_bound and any(isinstance(bound, Tensor) for bound in (*args, *kwargs.values())):
            return reference(input, *args, **kwargs)

        def run(x: Tensor) -> Step:
            if over:
                kept = slopes(x, *args, **kwargs)
                return Step(reference(x, *args, **kwargs), linear, kept)
            value = reference(x, *args, **kwargs)  # runs first, so that PyTorch raises its own errors
            return Step(value, linear, slopes(x, *args, **kwargs))

        return piecewise(input, run, over, filled)

    return route


def _is_inplace(reference: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return whether a call sets ``inplace``, which is the last argument of these functions."""
    position = {F.hardtanh: 2, F.relu6: 0, F.threshold: 2, F.hardsigmoid: 0}.get(reference)
    if position is None:
        return False
    return bool(args[position] if len(args) > position else kwargs.get("inplace", False))


def _fit(input: Tensor, arguments: Any) -> bool:
    """Return whether all tensor arguments are constants that neither broadcast the input nor change its dtype."""
    return all(
        type(argument) is Tensor
        and not argument.requires_grad
        and torch.result_type(input, argument) == input.dtype
        and argument.ndim <= input.ndim
        and all(size in (1, whole) for size, whole in zip(argument.shape[::-1], input.shape[::-1], strict=False))
        for argument in arguments
        if isinstance(argument, Tensor)
    )


def _ones(x: Tensor) -> Tensor:
    return x.new_ones(()).expand(x.shape)


# The slopes are PyTorch's own backward of ones. So they agree with PyTorch at the bounds, at NaN and in half precision.


def _hardtanh(x: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> tuple[Tensor, ...]:
    return (aten.hardtanh_backward(_ones(x), x, min_val, max_val).bool(),)


def _relu6(x: Tensor, inplace: bool = False) -> tuple[Tensor, ...]:
    return _hardtanh(x, 0, 6)


def _hardsigmoid(x: Tensor, inplace: bool = False) -> tuple[Tensor, ...]:
    return (aten.hardsigmoid_backward(_ones(x), x).bool(),)


def _threshold(x: Tensor, threshold: float, value: float, inplace: bool = False) -> tuple[Tensor, ...]:
    return (aten.threshold_backward(_ones(x), x, threshold).bool(),)


def _softshrink(x: Tensor, lambd: float = 0.5) -> tuple[Tensor, ...]:
    return (aten.softshrink_backward(_ones(x), x, lambd).bool(),)


def _hardshrink(x: Tensor, lambd: float = 0.5) -> tuple[Tensor, ...]:
    return (aten.hardshrink_backward(_ones(x), x, lambd).bool(),)


_at_least, _at_most = (torch.ge, torch.le) if clamp_passes_at_bound else (torch.gt, torch.lt)


def _clamp(x: Tensor, min: Bound = None, max: Bound = None) -> tuple[Tensor, ...]:
    if min is None:
        return (_at_most(x, max),)
    return (_at_least(x, min) if max is None else _at_least(x, min).logical_and_(_at_most(x, max)),)


def _clamp_max(x: Tensor, max: Bound) -> tuple[Tensor, ...]:
    return (_at_most(x, max),)


def _abs(x: Tensor) -> tuple[Tensor, ...]:
    return (x.sgn().to(torch.int8),)


def maximum(reference: Callable[..., Any], largest: bool) -> Callable[..., Any]:
    """Reroute maximum or minimum of two tensors if only one of them requires a gradient; the other is a constant."""

    def route(input: Tensor, *args: Any, **kwargs: Any) -> Any:
        other = args[0] if args else kwargs.get("other")
        if kwargs.keys() - {"other"} or len(args) > 1 or not isinstance(other, Tensor):
            return reference(input, *args, **kwargs)
        x, constant = (input, other) if input.requires_grad else (other, input)
        if not is_eligible(x) or not _fit(x, [constant]):
            return reference(input, *args, **kwargs)

        def run(x: Tensor) -> Step:
            passed = x < constant if largest else x > constant  # both comparisons are false at NaN
            return Step(reference(x, constant), CHOSEN, (passed.logical_not_(), x == constant))

        return piecewise(x, run, fills_zeros=False)

    return route


def functional_rrelu(
    input: Tensor, lower: float = 1 / 8, upper: float = 1 / 3, training: bool = False, inplace: bool = False
) -> Tensor:
    """``F.rrelu``."""
    return (rrelu_ if inplace else rrelu)(input, lower, upper, training)


def rrelu(
    input: Tensor,
    lower: float = 1 / 8,
    upper: float = 1 / 3,
    training: bool = False,
    generator: torch.Generator | None = None,
    over: bool = False,
) -> Tensor:
    """``torch.rrelu``. In evaluation it is a leaky ReLU. In training it saves the slopes that it has drawn."""
    reference: Any = torch.rrelu_ if over else torch.rrelu
    # If the bounds are this close, PyTorch's backward does not use the slopes that were drawn.
    if not is_eligible(input, over) or (training and upper - lower <= 1e-6):
        return reference(input, lower, upper, training, generator)  # type: ignore[no-any-return]
    if not training:
        reference(torch.empty_like(input[:0]), lower, upper)  # raises if the bounds are wrong
        result = leaky_relu(input, (lower + upper) / 2, over)
        return result if over else result.contiguous()  # PyTorch's result is contiguous

    def run(x: Tensor) -> Step:
        noise = torch.empty_like(x, memory_format=torch.contiguous_format)
        form = aten.rrelu_with_noise_ if over else aten.rrelu_with_noise
        return Step(form(x, noise, lower, upper, True, generator), DRAWN, (noise,))

    return piecewise(input, run, over)  # type: ignore[no-any-return]


rrelu_ = partial(rrelu, over=True)

_CALLS: list[Any] = [  # (linear, slopes, functions, in-place functions)
    (MASKED, _hardtanh, (F.hardtanh,), (F.hardtanh_,)),
    (MASKED, _relu6, (F.relu6,), ()),
    (SIXTH, _hardsigmoid, (F.hardsigmoid,), ()),
    (MASKED, _threshold, (F.threshold, torch.threshold), (torch.threshold_,)),
    (MASKED, _softshrink, (F.softshrink,), ()),
    (MASKED, _hardshrink, (F.hardshrink, torch.hardshrink, Tensor.hardshrink), ()),
    (
        MASKED,
        _clamp,
        (torch.clamp, torch.clip, Tensor.clamp, Tensor.clip),
        (torch.clamp_, torch.clip_, Tensor.clamp_, Tensor.clip_),
    ),
    (MASKED, _clamp, (torch.clamp_min, Tensor.clamp_min), (torch.clamp_min_, Tensor.clamp_min_)),
    (MASKED, _clamp_max, (torch.clamp_max, Tensor.clamp_max), (torch.clamp_max_, Tensor.clamp_max_)),
    (
        SCALED,
        _abs,
        (torch.abs, torch.absolute, Tensor.abs, Tensor.absolute, Tensor.__abs__),
        (torch.abs_, Tensor.abs_, Tensor.absolute_),
    ),
]
ROUTES: dict[Any, Callable[..., Any]] = {
    **{
        reference: elementwise(reference, linear, slopes, over)
        for linear, slopes, *forms in _CALLS
        for over, functions in zip((False, True), forms, strict=True)
        for reference in functions
    },
    **{f: maximum(f, True) for f in (torch.maximum, Tensor.maximum, torch.max, Tensor.max)},
    **{f: maximum(f, False) for f in (torch.minimum, Tensor.minimum, torch.min, Tensor.min)},
    F.rrelu: functional_rrelu,
    torch.rrelu: rrelu,
    **dict.fromkeys((F.rrelu_, torch.rrelu_), rrelu_),
}
