"""A leaky ReLU at a higher resolution, between upsampling and downsampling."""

from __future__ import annotations

from math import inf, isfinite

import torch
from torch import Tensor

from fastgan import backends, torch_private
from fastgan.ops.bias_act import bias_act, check_bias
from fastgan.ops.filtered_lrelu.autograd import Steps, apply
from fastgan.ops.library import accumulation_dtype, visible
from fastgan.ops.upfirdn2d import Factor, check_image, geometry_of, is_constant, number_of, plan_of, upfirdn2d
from fastgan.ops.upfirdn2d.plan import image_size

__all__ = ["filtered_lrelu"]


MOST = 4  # the largest factor of Triton's kernel


def filtered_lrelu(
    input: Tensor,
    up_filter: Tensor | None = None,
    down_filter: Tensor | None = None,
    bias: Tensor | None = None,
    up: Factor = 1,
    down: Factor = 1,
    padding: Factor = 0,
    gain: float = 2**0.5,
    slope: float = 0.2,
    clamp: float | None = None,
    flip_filter: bool = False,
    *,
    backend: str | None = None,
) -> Tensor:
    """Add a bias, upsample, apply a leaky ReLU with gain and clamp, and downsample.

    The function combines `upfirdn2d` and `bias_act`. The upsampling has the gain up_x * up_y, which compensates for the
    zeros between the elements. On a CPU, one kernel computes all steps, plane by plane, and never stores the upsampled
    image. For the derivatives it saves one bit per upsampled element (two with ``clamp``). On a
    GPU, the kernel of the first filter also applies the activation and saves two bits, and the second filter follows.

    All steps are computed in float32 (float64 for float64 input), up to the result on a CPU and up to the activation on
    a GPU. The result has the memory format of the input.

    Order of derivative: any. If the filters are constant, the function is piecewise affine and allows one pass.

    Source: Karras et al., Alias-Free Generative Adversarial Networks (2021).

    ```python
    import torch
    import fastgan

    taps = torch.tensor([1.0, 5.0, 9.0, 9.0, 5.0, 1.0]) / 30
    x = torch.randn(2, 3, 16, 16)
    bias = torch.zeros(3)
    y = fastgan.ops.filtered_lrelu(x, taps, taps, bias, up=2, down=2, padding=5)
    assert y.shape == x.shape
    ```

    Args:
        input: (N, C, H, W); float16, bfloat16, float32 or float64.
        up_filter: filter of the upsampling: (h, w), (k,) for a separable filter, or None.
        down_filter: filter of the downsampling, in the same forms.
        bias: (C,), in the dtype of the input or in float32, or None.
        up: factor of the upsampling, one number or (x, y).
        down: factor of the downsampling, one number or (x, y).
        padding: padding of the upsampled image: one number, (x, y), or (left, right, top, bottom).
        gain: factor of the leaky ReLU's result.
        slope: slope of the leaky ReLU for negative values.
        clamp: largest magnitude of the leaky ReLU's result. None: no limit.
        flip_filter: correlate instead of convolving, with both filters.
        backend: name of the backend to use. None: the fastest one.

    Returns:
        (N, C, H', W'), dtype of the input.

    Raises:
        TypeError: an argument is not a tensor or a number, or has an unsupported dtype.
        ValueError: a shape or factor does not fit, or the result would be empty.
        BackendUnavailable: the requested backend cannot run here.
    """
    check_image(input)
    size = image_size(input)
    first = geometry_of(size, up_filter, up, 1, padding, "up_filter")
    second = geometry_of(first.out_size, down_filter, 1, down, 0, "down_filter")
    slope = number_of("slope", slope)
    if bias is not None:
        check_bias(bias, input, 1)
    factor = first.up[0] * first.up[1]
    numbers = (gain, slope, 1.0 if clamp is None else clamp)
    chosen = _fused_by(input, up_filter, down_filter, numbers, clamp is not None, backend)
    if chosen == "triton" and max(*first.up, *second.down) > MOST:
        chosen = None
    if chosen is not None:
        plans = (
            plan_of(size, first, up_filter, input, flip_filter, factor, chosen),
            plan_of(first.out_size, second, down_filter, input, flip_filter, 1.0, chosen),
        )
        steps = Steps(*plans, slope, float(gain), inf if clamp is None else float(clamp))
        if bias is None or not torch_private.count_function_modes():
            return in_one(input, bias, steps)
        return in_one(_plus(input, bias, backend), None, steps).to(input.dtype)  # one pass has a rule for bias_act
    # Elements near 0 or the clamp would get other slopes if the sum or the upsampled image were rounded.
    y = _plus(input, bias, backend)
    y = upfirdn2d(y, up_filter, up, 1, padding, flip_filter, factor, backend=backend)
    y = bias_act(y, activation="leaky_relu", negative_slope=slope, gain=gain, clamp=clamp, backend=backend)
    return upfirdn2d(y, down_filter, 1, down, 0, flip_filter, backend=backend).to(input.dtype)


def _plus(input: Tensor, bias: Tensor | None, backend: str | None) -> Tensor:
    """Return the sum, not rounded to half precision."""
    dtype = accumulation_dtype(input.dtype)
    input = input.to(dtype)
    return input if bias is None else bias_act(input, bias.to(dtype), activation="linear", backend=backend)


@visible
def in_one(input: Tensor, bias: Tensor | None, steps: Steps) -> Tensor:
    """The function is piecewise affine. Without a bias and a clamp, its pieces pass through zero."""
    return apply(input, bias, steps)


def _fused_by(
    input: Tensor,
    up_filter: Tensor | None,
    down_filter: Tensor | None,
    numbers: tuple[float, ...],
    clamped: bool,
    backend: str | None,
) -> str | None:
    """Return the backend whose kernel supports this call. Other calls run the steps one by one, with their errors."""
    if not (
        input.numel() > 0
        and all(isinstance(number, int | float) and isfinite(number) for number in numbers)
        and numbers[2] > 0
        and not (clamped and torch_private.count_function_modes())  # one pass needs the constants of a clamp
        and is_constant(up_filter)
        and is_constant(down_filter)
        and not torch.compiler.is_compiling()
        and not backends.is_lowered()
        and backends.is_plain()
    ):
        return None
    chosen = backends.select("filtered_lrelu", input.device, input.dtype, backend)
    return chosen if chosen in ("cpu", "triton") else None
