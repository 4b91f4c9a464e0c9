"""Fused bias and activation; backward and double backward take one pass each."""

from __future__ import annotations

from math import inf, isfinite
from numbers import Real

import torch
from torch import Tensor

from fastgan.ops.bias_act.autograd import activate
from fastgan.ops.bias_act.functions import gelu, leaky_relu, relu, sigmoid, silu, softplus, tanh
from fastgan.ops.bias_act.layout import ACTIVATIONS, ALIASES, DTYPES, GAINS, UNFUSED, Options
from fastgan.ops.library import visible

__all__ = ["bias_act", "gelu", "leaky_relu", "relu", "sigmoid", "silu", "softplus", "tanh"]


@visible
def bias_act(
    input: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str = "leaky_relu",
    dim: int = 1,
    negative_slope: float = 0.2,
    gain: float | None = 1.0,
    clamp: float | None = None,
    inplace: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Add a bias to each channel, apply an activation, scale and clamp: y = clip(gain * act(x + b), -clamp, clamp).

    Order of derivative: any. Piecewise linear activations ("linear", "relu", "leaky_relu") take one pass over the data
    per order. They save one bit per element (two with ``clamp``) instead of the input. Smooth activations ("silu",
    "gelu", "gelu_tanh", "tanh", "sigmoid", "softplus", defined as in ``torch.nn.functional``; "gelu_tanh" is
    ``gelu(approximate="tanh")``) take one pass each for backward and double backward, and PyTorch operations from the
    third order on. They save the input. tanh and sigmoid with a gain of 1 and no clamp save the result instead.
    "elu" and "selu" run as PyTorch operations. "lrelu" and "swish" are other names of "leaky_relu" and "silu".

    The computation runs in float32 (float64 for float64 input). A half-precision result is rounded once, at the end.
    The bias gradient is summed in a fixed order, so the same inputs give the same bits. The result has the strides of
    the input, including channels_last.

    Source: Karras et al., Alias-Free Generative Adversarial Networks (2021), whose ``bias_act`` has this form.

    ```python
    import torch
    import fastgan

    x, bias = torch.randn(8, 64, 16, 16), torch.zeros(64)
    y = fastgan.ops.bias_act(x, bias, activation="leaky_relu", gain=2**0.5)
    ```

    Args:
        input: tensor of any shape; float16, bfloat16, float32 or float64.
        bias: (input.shape[dim],), or None. It has the dtype of the input, or float32 if the input is in half precision.
        activation: one of the names above.
        dim: dimension of the channels.
        negative_slope: slope of leaky_relu for negative values.
        gain: factor applied after the activation. There is no implicit factor of sqrt(2), unless it is None: StyleGAN's
            gain, sqrt(2) for relu, leaky_relu and silu, and 1 for others.
        clamp: largest magnitude of the result, greater than 0. None: no limit.
        inplace: overwrite ``input``.
        backend: name of the backend to use. None: the fastest one.

    Returns:
        A tensor with the shape and dtype of the input.

    Raises:
        TypeError: an argument is not a tensor or a number, or has an unsupported dtype.
        ValueError: the activation is unknown, or a shape, device or number does not fit.
        BackendUnavailable: the requested backend cannot run here.
    """
    if not isinstance(input, Tensor):
        raise TypeError(f"input must be a tensor, got {type(input).__name__}")
    if input.dtype not in DTYPES:
        raise TypeError(f"input must be float16, bfloat16, float32 or float64, got {input.dtype}")
    activation = ALIASES.get(activation, activation)
    if activation not in ACTIVATIONS and activation not in UNFUSED:
        names = ", ".join((*ACTIVATIONS, *UNFUSED, *ALIASES))
        raise ValueError(f"activation must be one of {names}, got {activation!r}")
    if gain is None:
        gain = GAINS.get(activation, 1.0)
    _check_number("negative_slope", negative_slope)
    _check_number("gain", gain)
    if clamp is not None:
        _check_number("clamp", clamp)
        if clamp <= 0:
            raise ValueError(f"clamp must be above 0 or None, got {clamp}")
    if bias is not None:
        dim = check_bias(bias, input, dim)
    options = Options(activation, float(negative_slope), float(gain), inf if clamp is None else float(clamp))
    return activate(input, bias, dim, options, inplace, backend)


def _check_number(name: str, value: float) -> None:
    # isinstance(value, Real) is slow, so the common case comes first.
    if type(value) is not float and (not isinstance(value, Real) or isinstance(value, bool)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")


def check_bias(bias: Tensor, input: Tensor, dim: int) -> int:
    if not isinstance(bias, Tensor):
        raise TypeError(f"bias must be a tensor or None, got {type(bias).__name__}")
    if not -input.ndim <= dim < input.ndim:
        raise ValueError(f"dim must be a dimension of the input with shape {tuple(input.shape)}, got {dim}")
    dim %= input.ndim
    half = input.dtype in (torch.float16, torch.bfloat16)
    if bias.dtype != input.dtype and not (half and bias.dtype == torch.float32):
        raise TypeError(
            f"bias must have the input's dtype, {input.dtype}, or float32 if the input is in half precision, "
            f"got {bias.dtype}"
        )
    if bias.shape != input.shape[dim : dim + 1]:
        raise ValueError(
            f"bias must have shape ({input.shape[dim]},), the size of dimension {dim}, got {tuple(bias.shape)}"
        )
    if bias.device != input.device:
        raise ValueError(f"bias must be on the input's device, {input.device}, got {bias.device}")
    return dim
