"""Resampling of images with an FIR filter. The operation is linear, and its gradient is the same operation."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor

from fastgan import backends
from fastgan.ops.library import accumulation_dtype, visible
from fastgan.ops.upfirdn2d import reference
from fastgan.ops.upfirdn2d.autograd import CONVOLUTIONS, DTYPES, apply
from fastgan.ops.upfirdn2d.filters import plane_of, taps_of
from fastgan.ops.upfirdn2d.plan import Pair, Plan, Taps, image_size

__all__ = ["downsample2d", "filter2d", "upfirdn2d", "upsample2d"]

Factor = int | Sequence[int]


@visible
def upfirdn2d(
    input: Tensor,
    filter: Tensor | None,
    up: Factor = 1,
    down: Factor = 1,
    padding: Factor = 0,
    flip_filter: bool = False,
    gain: float = 1.0,
    *,
    backend: str | None = None,
) -> Tensor:
    """Upsample by zeros, pad or crop, filter, and downsample.

    The four steps, for each channel:

    1. Insert ``up`` - 1 zeros after each element.
    2. Pad with zeros. Negative padding crops.
    3. Convolve with ``filter`` times ``gain``, without further padding.
    4. Keep every ``down``-th element.

    The result has (H * up + top + bottom - h) // down + 1 rows, and as many columns by the same formula.

    Order of derivative: any. The gradient is ``upfirdn2d`` with exchanged factors and a flipped filter. The function
    allows one pass. Products with inserted zeros are skipped. A filter of rank one, such as an outer product, is
    applied as two filters, one per direction. If the filter requires a gradient, PyTorch's operations run.

    The computation runs in float32 (float64 for float64 input). The result has the memory format of the input.

    Source: Karras et al., Analyzing and Improving the Image Quality of StyleGAN (2020).

    ```python
    import torch
    import fastgan

    taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
    half = fastgan.ops.upfirdn2d(torch.randn(2, 3, 16, 16), taps, down=2, padding=1)
    assert half.shape == (2, 3, 8, 8)
    ```

    Args:
        input: (N, C, H, W); float16, bfloat16, float32 or float64.
        filter: (h, w), or (k,) for a separable filter with the same taps in both directions. None: no filter.
        up: factor of the upsampling, one number or (x, y).
        down: factor of the downsampling, one number or (x, y).
        padding: zeros around the upsampled image: one number, (x, y), or (left, right, top, bottom).
        flip_filter: correlate instead of convolving.
        gain: factor of the result.
        backend: name of the backend to use. None: the fastest one.

    Returns:
        (N, C, H', W'), dtype of the input.

    Raises:
        TypeError: an argument is not a tensor or a number, or has an unsupported dtype.
        ValueError: a shape or factor does not fit, or the result would be empty.
        BackendUnavailable: the requested backend cannot run here.
    """
    check_image(input)
    geometry = geometry_of(image_size(input), filter, up, down, padding)
    gain = number_of("gain", gain)
    if not is_constant(filter) or torch.compiler.is_compiling() or not backends.is_plain():
        return reference.upfirdn2d(input, _plane(filter, input, flip_filter, gain), *geometry)
    chosen = backends.select("upfirdn2d", input.device, input.dtype, backend)
    if chosen == "reference" and not backends.is_forced(backend):
        chosen = CONVOLUTIONS
    return apply(input, plan_of(image_size(input), geometry, filter, input, flip_filter, gain, chosen))


class Geometry(NamedTuple):
    """(y, x) each"""

    up: Pair
    down: Pair
    start: Pair
    out_size: Pair


def geometry_of(
    in_size: Pair, filter: Tensor | None, up: Factor, down: Factor, padding: Factor, name: str = "filter"
) -> Geometry:
    """The name is that of the filter in an error message."""
    (ux, uy), (dx, dy) = factor_of("up", up), factor_of("down", down)
    left, right, top, bottom = padding_of(padding)
    h, w = shape_of(filter, name)
    total = in_size[0] * uy + top + bottom, in_size[1] * ux + left + right
    if total[0] < h or total[1] < w:
        raise ValueError(
            f"{name} of shape {(h, w)} does not fit into the padded image of shape {total}: "
            "the filter must be smaller or the padding larger"
        )
    return Geometry((uy, ux), (dy, dx), (top, left), ((total[0] - h) // dy + 1, (total[1] - w) // dx + 1))


def plan_of(
    in_size: Pair, geometry: Geometry, filter: Tensor | None, like: Tensor, flip: bool, gain: float, backend: str
) -> Plan:
    up, down, start, out_size = geometry
    return Plan(_taps(filter, like, flip, gain), up, down, start, in_size, out_size, backend)


def is_constant(filter: Tensor | None) -> bool:
    return filter is None or not (filter.requires_grad and torch.is_grad_enabled())


def upsample2d(
    input: Tensor,
    filter: Tensor | None,
    up: Factor = 2,
    padding: Factor = 0,
    flip_filter: bool = False,
    gain: float = 1.0,
    *,
    backend: str | None = None,
) -> Tensor:
    """Enlarge an image by a factor, with a centered filter. See `upfirdn2d`.

    Order of derivative: any.

    ```python
    import torch
    import fastgan

    taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
    large = fastgan.ops.upsample2d(torch.randn(2, 3, 16, 16), taps)  # (2, 3, 32, 32)
    ```

    Args:
        input: (N, C, H, W); float16, bfloat16, float32 or float64.
        filter: (h, w), (k,) or None.
        up: factor of the upsampling, one number or (x, y).
        padding: padding of the result, in addition to the padding that centers the filter.
        flip_filter: correlate instead of convolving.
        gain: factor of the result, in addition to up_x * up_y, which compensates for the inserted zeros.
        backend: name of the backend to use. None: the fastest one.

    Returns:
        (N, C, H * up, W * up) without padding, dtype of the input.

    Raises:
        TypeError, ValueError, BackendUnavailable: as in `upfirdn2d`.
    """
    ux, uy = factor_of("up", up)
    h, w = shape_of(filter)
    around = (w + ux - 1) // 2, (w - ux) // 2, (h + uy - 1) // 2, (h - uy) // 2
    gain = number_of("gain", gain) * ux * uy
    return upfirdn2d(input, filter, (ux, uy), 1, _sum(padding, around), flip_filter, gain, backend=backend)


def downsample2d(
    input: Tensor,
    filter: Tensor | None,
    down: Factor = 2,
    padding: Factor = 0,
    flip_filter: bool = False,
    gain: float = 1.0,
    *,
    backend: str | None = None,
) -> Tensor:
    """Reduce an image by a factor, with a centered filter. See `upfirdn2d`.

    Order of derivative: any.

    ```python
    import torch
    import fastgan

    taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
    small = fastgan.ops.downsample2d(torch.randn(2, 3, 16, 16), taps)  # (2, 3, 8, 8)
    ```

    Args:
        input: (N, C, H, W); float16, bfloat16, float32 or float64.
        filter: (h, w), (k,) or None.
        down: factor of the downsampling, one number or (x, y).
        padding: padding of the input, in addition to the padding that centers the filter.
        flip_filter: correlate instead of convolving.
        gain: factor of the result.
        backend: name of the backend to use. None: the fastest one.

    Returns:
        (N, C, H / down, W / down) without padding, dtype of the input.

    Raises:
        TypeError, ValueError, BackendUnavailable: as in `upfirdn2d`.
    """
    dx, dy = factor_of("down", down)
    h, w = shape_of(filter)
    around = (w - dx + 1) // 2, (w - dx) // 2, (h - dy + 1) // 2, (h - dy) // 2
    return upfirdn2d(input, filter, 1, (dx, dy), _sum(padding, around), flip_filter, gain, backend=backend)


def filter2d(
    input: Tensor,
    filter: Tensor | None,
    padding: Factor = 0,
    flip_filter: bool = False,
    gain: float = 1.0,
    *,
    backend: str | None = None,
) -> Tensor:
    """Filter an image and keep its size. See `upfirdn2d`.

    Order of derivative: any.

    ```python
    import torch
    import fastgan

    taps = torch.tensor([1.0, 2.0, 1.0]) / 4
    blurred = fastgan.ops.filter2d(torch.randn(2, 3, 16, 16), taps)  # (2, 3, 16, 16)
    ```

    Args:
        input: (N, C, H, W); float16, bfloat16, float32 or float64.
        filter: (h, w), (k,) or None.
        padding: padding of the result, in addition to the padding that centers the filter.
        flip_filter: correlate instead of convolving.
        gain: factor of the result.
        backend: name of the backend to use. None: the fastest one.

    Returns:
        (N, C, H, W) without padding, dtype of the input.

    Raises:
        TypeError, ValueError, BackendUnavailable: as in `upfirdn2d`.
    """
    h, w = shape_of(filter)
    around = w // 2, (w - 1) // 2, h // 2, (h - 1) // 2
    return upfirdn2d(input, filter, 1, 1, _sum(padding, around), flip_filter, gain, backend=backend)


def _sum(padding: Factor, around: tuple[int, int, int, int]) -> list[int]:
    return [given + own for given, own in zip(padding_of(padding), around, strict=True)]


def check_image(input: Tensor) -> None:
    if not isinstance(input, Tensor):
        raise TypeError(f"input must be a tensor, got {type(input).__name__}")
    if input.dtype not in DTYPES:
        raise TypeError(f"input must be float16, bfloat16, float32 or float64, got {input.dtype}")
    if input.ndim != 4:
        raise ValueError(f"input must have shape (N, C, H, W), got {tuple(input.shape)}")


def shape_of(filter: Tensor | None, name: str = "filter") -> Pair:
    """(h, w); without a filter (1, 1)"""
    if filter is None:
        return 1, 1
    if not isinstance(filter, Tensor):
        raise TypeError(f"{name} must be a tensor or None, got {type(filter).__name__}")
    if not filter.is_floating_point():
        raise TypeError(f"{name} must be floating-point, got {filter.dtype}")
    h, w = image_size(filter[None] if filter.ndim == 1 else filter) if filter.ndim in (1, 2) else (0, 0)
    if h == 0 or w == 0:
        raise ValueError(f"{name} must have shape (h, w) or (k,), got {tuple(filter.shape)}")
    return (w, w) if filter.ndim == 1 else (h, w)


def factor_of(name: str, given: Factor) -> Pair:
    """(x, y)"""
    sizes = _numbers(name, given)
    if len(sizes) not in (1, 2) or min(sizes) < 1:
        raise ValueError(f"{name} must be a positive number or a pair (x, y) of them, got {given!r}")
    return sizes[0], sizes[-1]


def padding_of(given: Factor) -> tuple[int, int, int, int]:
    """(left, right, top, bottom)"""
    sizes = _numbers("padding", given)
    if len(sizes) == 4:
        return sizes[0], sizes[1], sizes[2], sizes[3]
    if len(sizes) > 2 or not sizes:
        raise ValueError(f"padding must be a number, (x, y) or (left, right, top, bottom), got {given!r}")
    return sizes[0], sizes[0], sizes[-1], sizes[-1]


def _numbers(name: str, given: Factor) -> list[int]:
    try:
        return [operator.index(size) for size in (given if isinstance(given, Sequence) else (given,))]
    except TypeError:
        raise TypeError(f"{name} must be an integer or a sequence of integers, got {given!r}") from None


def number_of(name: str, given: float) -> float:
    # isinstance(given, Real) is slow, so the common case comes first. A tensor could require a gradient.
    if type(given) is not float and not isinstance(given, Real):
        raise TypeError(f"{name} must be a number, got {type(given).__name__}")
    return float(given)


def _taps(filter: Tensor | None, input: Tensor, flip: bool, gain: float) -> Taps | Tensor:
    acc = accumulation_dtype(input.dtype)
    if filter is None:
        return taps_of(None, flip, gain, acc)
    unread = filter.is_meta or backends.is_lowered()
    if unread or (filter.is_cuda and torch.cuda.is_current_stream_capturing()):
        return _plane(filter, input, flip, gain)
    return taps_of(filter, flip, gain, acc)


def _plane(filter: Tensor | None, input: Tensor, flip: bool, gain: float) -> Tensor:
    """Return the filter (h, w) in the order of the input, multiplied by the gain."""
    acc = accumulation_dtype(input.dtype)
    if filter is None:
        return torch.full((1, 1), gain, dtype=acc, device=input.device)
    plane = plane_of(filter).to(input.device, acc)
    return (plane if flip else plane.flip((0, 1))) * gain
