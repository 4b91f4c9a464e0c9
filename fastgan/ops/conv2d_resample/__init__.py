"""A convolution with upsampling before it or downsampling after it, at the lower resolution."""

from __future__ import annotations

from torch import Tensor

from fastgan.ops.conv.of_models import conv2d, conv_transpose2d
from fastgan.ops.upfirdn2d import Factor, padding_of, shape_of, upfirdn2d
from fastgan.ops.upfirdn2d.plan import image_size

__all__ = ["conv2d_resample"]


def conv2d_resample(
    input: Tensor,
    weight: Tensor,
    filter: Tensor | None = None,
    up: int = 1,
    down: int = 1,
    padding: Factor = 0,
    groups: int = 1,
    flip_weight: bool = True,
    flip_filter: bool = False,
) -> Tensor:
    """Upsample with a filter, convolve with a weight, and downsample with the filter.

    The filter is centered, as in `upsample2d` and `downsample2d`. The convolution itself adds no padding. Filter and
    convolution commute, so the convolution runs at the lower resolution: as a transposed convolution with stride ``up``
    before the filter, or with stride ``down`` after it.

    Order of derivative: any. See `upfirdn2d` and `conv2d`.

    Source: Karras et al., Analyzing and Improving the Image Quality of StyleGAN (2020).

    ```python
    import torch
    import fastgan

    taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
    x, weight = torch.randn(2, 3, 16, 16), torch.randn(8, 3, 3, 3)
    y = fastgan.ops.conv2d_resample(x, weight, taps, down=2, padding=1)  # (2, 8, 8, 8)
    ```

    Args:
        input: (N, C, H, W).
        weight: (K, C / groups, h, w).
        filter: (h, w), (k,) for a separable filter, or None.
        up: factor of the upsampling.
        down: factor of the downsampling.
        padding: padding of the upsampled image: one number, (x, y), or (left, right, top, bottom).
        groups: groups of the convolution.
        flip_weight: correlate with the weight, as ``torch.nn.functional.conv2d`` does, instead of convolving.
        flip_filter: correlate with the filter instead of convolving.

    Returns:
        (N, K, H', W'), dtype of the input.

    Raises:
        TypeError: an argument has an unsupported type.
        ValueError: a factor or groups is not positive, a shape does not fit, or the result would be empty.
    """
    _check_tensors(input, weight, groups)
    for name, factor in (("up", up), ("down", down)):
        if not isinstance(factor, int) or factor < 1:
            raise ValueError(f"{name} must be a positive integer, got {factor!r}")
    fh, fw = shape_of(filter)
    left, right, top, bottom = padding_of(padding)
    if up > 1:
        left, right, top, bottom = (
            left + (fw + up - 1) // 2,
            right + (fw - up) // 2,
            top + (fh + up - 1) // 2,
            bottom + (fh - up) // 2,
        )
    if down > 1:
        left, right, top, bottom = (
            left + (fw - down + 1) // 2,
            right + (fw - down) // 2,
            top + (fh - down + 1) // 2,
            bottom + (fh - down) // 2,
        )
    kh, kw = image_size(weight)
    h, w = image_size(input)
    padded = h * up + top + bottom, w * up + left + right
    times = (up > 1) + (down > 1)  # that the filter is applied
    if padded[0] < kh + times * (fh - 1) or padded[1] < kw + times * (fw - 1):
        raise ValueError(
            f"weight of shape {(kh, kw)} and filter of shape {(fh, fw)} do not fit into the padded image of shape "
            f"{padded}: they must be smaller or the padding larger"
        )
    if not flip_weight and (kh > 1 or kw > 1):
        weight = weight.flip((2, 3))
    around = left, right, top, bottom
    if kh == kw == 1:
        return _pointwise(input, weight, filter, up, down, around, groups, flip_filter)
    if up > 1:
        # The transposed convolution is a full convolution, padded by kernel - 1 elements, without the zeros at the end.
        input = conv_transpose2d(input, _transposed(weight, groups), stride=up, groups=groups)
        around = left - kw + 1, right - kw + up, top - kh + 1, bottom - kh + up
        input = upfirdn2d(input, filter, 1, 1, around, flip_filter, up * up)
        return input if down == 1 else upfirdn2d(input, filter, 1, down, 0, flip_filter)
    if down > 1:
        input = upfirdn2d(input, filter, 1, 1, around, flip_filter)
        return conv2d(input, weight, stride=down, groups=groups)
    if left == right >= 0 and top == bottom >= 0:
        return conv2d(input, weight, padding=(top, left), groups=groups)
    return conv2d(upfirdn2d(input, None, 1, 1, around), weight, groups=groups)


def _check_tensors(input: Tensor, weight: Tensor, groups: int) -> None:
    for name, tensor in (("input", input), ("weight", weight)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.ndim != 4:
            raise ValueError(f"{name} must have 4 dimensions, got {tuple(tensor.shape)}")
    if not isinstance(groups, int) or groups < 1:
        raise ValueError(f"groups must be a positive integer, got {groups!r}")
    if weight.shape[0] % groups or weight.shape[1] * groups != input.shape[1]:
        raise ValueError(
            f"weight must have shape (K, C / groups, h, w) with C={input.shape[1]} and K divisible by groups={groups}, "
            f"got {tuple(weight.shape)}"
        )


def _pointwise(
    input: Tensor,
    weight: Tensor,
    filter: Tensor | None,
    up: int,
    down: int,
    around: tuple[int, int, int, int],
    groups: int,
    flip_filter: bool,
) -> Tensor:
    """Run a 1x1 kernel where there are the fewest pixels. It commutes with all other steps."""
    if up == 1:
        if down > 1 or any(around):
            input = upfirdn2d(input, filter if down > 1 else None, 1, down, around, flip_filter)
        return conv2d(input, weight, groups=groups)
    input = upfirdn2d(conv2d(input, weight, groups=groups), filter, up, 1, around, flip_filter, up * up)
    return input if down == 1 else upfirdn2d(input, filter, 1, down, 0, flip_filter)


def _transposed(weight: Tensor, groups: int) -> Tensor:
    """Return the weight (C, K / groups, h, w) of the transposed convolution that correlates with ``weight``."""
    k, c, h, w = weight.shape
    weight = weight.flip((2, 3)).reshape(groups, k // groups, c, h, w)
    return weight.transpose(1, 2).reshape(groups * c, k // groups, h, w)
