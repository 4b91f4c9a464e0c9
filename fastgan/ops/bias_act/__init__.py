"""Bias and activation in one pass, differentiable twice in one pass each."""

from __future__ import annotations

from math import inf, isfinite
from numbers import Real

import torch
from torch import Tensor

from fastgan.ops.bias_act.autograd import activate
from fastgan.ops.bias_act.functions import gelu, leaky_relu, relu, sigmoid, silu, softplus, tanh
from fastgan.ops.bias_act.layout import ACTIVATIONS, DTYPES, Options
from fastgan.ops.library import symbolic

__all__ = ["bias_act", "gelu", "leaky_relu", "relu", "sigmoid", "silu", "softplus", "tanh"]


@symbolic
def bias_act(
    input: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str = "leaky_relu",
    dim: int = 1,
    negative_slope: float = 0.2,
    gain: float = 1.0,
    clamp: float | None = None,
    inplace: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Add a bias to each channel, activate, scale and cut off: y = min(max(gain act(x + b), -clamp), clamp).

    Differentiable to any order. Piecewise linear activations ("linear", "relu", "leaky_relu") take one pass over the
    data an order, which reads one bit an element (a second with ``clamp``) instead of an activation. Smooth ones
    ("silu", "gelu", "gelu_tanh", "tanh", "sigmoid", "softplus", as in ``torch.nn.functional``; "gelu_tanh" is
    ``approximate="tanh"``) take one pass each for backward and double backward, and PyTorch's operations from the third
    order on. They keep the input; tanh and sigmoid (with a gain of 1 and no clamp) keep the result.

    Computed in float32 (float64 for float64 input), whose rounding is the only one of a half-precision result; the
    bias's gradient is summed in one order: the same inputs give the same bits. The strides of the input are kept,
    channels_last too.

    Args:
        input: any shape, float16, bfloat16, float32 or float64; the result's shape and dtype.
        bias: (input.shape[dim],), of the input's dtype, or float32 with an input in half precision.
        activation: one of those above.
        dim: the dimension of the channels.
        negative_slope: of leaky_relu.
        gain: factor after the activation; nothing is multiplied by sqrt(2) unasked.
        clamp: above 0, largest magnitude of the result; None: unlimited.
        inplace: write over ``input``.
        backend: run on this backend instead of the fastest.

    Raises:
        TypeError: something is not a tensor, or a dtype is not as above.
        ValueError: unknown activation, or a shape, device or number is not as above.
        BackendUnavailable: the backend asked for cannot run here.

    Source of the form: Karras et al., Alias-Free Generative Adversarial Networks (2021).
    """
    if not isinstance(input, Tensor):
        raise TypeError(f"input must be a tensor, got {type(input).__name__}")
    if input.dtype not in DTYPES:
        raise TypeError(f"input must be float16, bfloat16, float32 or float64, got {input.dtype}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    _check_number("negative_slope", negative_slope)
    _check_number("gain", gain)
    if clamp is not None:
        _check_number("clamp", clamp)
        if clamp <= 0:
            raise ValueError(f"clamp must be above 0 or None, got {clamp}")
    if bias is not None:
        dim = _check_bias(bias, input, dim)
    options = Options(activation, float(negative_slope), float(gain), inf if clamp is None else float(clamp))
    return activate(input, bias, dim, options, inplace, backend)


def _check_number(name: str, value: float) -> None:
    if type(value) is not float and (not isinstance(value, Real) or isinstance(value, bool)):  # asking Real is slow
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")


def _check_bias(bias: Tensor, input: Tensor, dim: int) -> int:
    if not isinstance(bias, Tensor):
        raise TypeError(f"bias must be a tensor or None, got {type(bias).__name__}")
    if not -input.ndim <= dim < input.ndim:
        raise ValueError(f"dim must be a dimension of the input, {tuple(input.shape)}, got {dim}")
    dim %= input.ndim
    half = input.dtype in (torch.float16, torch.bfloat16)
    if bias.dtype != input.dtype and not (half and bias.dtype == torch.float32):
        raise TypeError(f"bias must have the input's dtype, {input.dtype}, or float32 for half, got {bias.dtype}")
    if bias.shape != input.shape[dim : dim + 1]:
        raise ValueError(f"bias must have shape ({input.shape[dim]},), dimension {dim}, got {tuple(bias.shape)}")
    if bias.device != input.device:
        raise ValueError(f"bias must be on the input's device, {input.device}, got {bias.device}")
    return dim
