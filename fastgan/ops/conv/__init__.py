"""conv1d, conv2d, conv3d and their transposes, as in torch.nn.functional, with an efficient double backward."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastgan import backends
from fastgan.ops.conv.autograd import convolve
from fastgan.ops.conv.geometry import Geometry
from fastgan.ops.library import is_autocast

__all__ = ["conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"]

Size = int | Sequence[int]


def _conv(n: int) -> Callable[..., Tensor]:
    torch_conv = (F.conv1d, F.conv2d, F.conv3d)[n - 1]

    def conv(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Size = 1,
        padding: Size | str = 0,
        dilation: Size = 1,
        groups: int = 1,
    ) -> Tensor:
        if not _is_eligible(input, weight, n):
            return torch_conv(input, weight, bias, stride, padding, dilation, groups)
        if input.ndim == n + 1:
            return conv(input.unsqueeze(0), weight, bias, stride, padding, dilation, groups).squeeze(0)
        sizes = _tuple(stride, n), _tuple(dilation, n)
        if isinstance(padding, str):
            input, padded = _pad(input, weight, padding, *sizes)
        else:
            padded = _tuple(padding, n)
        geometry = Geometry(sizes[0], padded, sizes[1], False, (0,) * n, groups, _kernels_allowed())
        return convolve(*_autocast(input, weight, bias), geometry)

    return _named(conv, n, f"conv{n}d", "(C_out, C_in / groups, *K)")


def _conv_transpose(n: int) -> Callable[..., Tensor]:
    torch_conv = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[n - 1]

    def conv_transpose(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Size = 1,
        padding: Size = 0,
        output_padding: Size = 0,
        groups: int = 1,
        dilation: Size = 1,
    ) -> Tensor:
        if not _is_eligible(input, weight, n):
            return torch_conv(input, weight, bias, stride, padding, output_padding, groups, dilation)
        if input.ndim == n + 1:
            batch = input.unsqueeze(0)
            return conv_transpose(batch, weight, bias, stride, padding, output_padding, groups, dilation).squeeze(0)
        steps, padded, dilations, further = (_tuple(size, n) for size in (stride, padding, dilation, output_padding))
        geometry = Geometry(steps, padded, dilations, True, further, groups, _kernels_allowed())
        return convolve(*_autocast(input, weight, bias), geometry)

    return _named(conv_transpose, n, f"conv_transpose{n}d", "(C_in, C_out / groups, *K)")


def _named(function: Any, n: int, name: str, weight_shape: str) -> Callable[..., Tensor]:
    function.__name__ = function.__qualname__ = name
    sizes, weight_sizes = ", ".join(["8"] * n), ", ".join(["3"] * n)
    channels = "3, 16" if "transpose" in name else "16, 3"
    options = {
        "stride": "step of the kernel, one number or one per dimension.",
        "padding": "zeros on both sides of each dimension of the input, one number or one per dimension.",
        "dilation": "distance between elements of the kernel, one number or one per dimension.",
        "groups": "number of groups of channels that are convolved separately.",
    }
    if "transpose" in name:
        options["padding"] = "rows and columns that are removed from each side of the result."
        options["output_padding"] = "rows and columns that are added to one side of the result."
    else:
        options["padding"] = options["padding"][:-1] + ', or "valid" or "same".'
    entries = "\n        ".join(
        f"{option}: {options[option]}" for option in signature(function).parameters if option in options
    )
    function.__doc__ = f"""Drop-in for ``torch.nn.functional.{name}`` with the same arguments, results and errors.

    Order of derivative: any. Each backward computes only the requested gradients.

    ```python
    import torch
    import fastgan

    weight = torch.randn({channels}, {weight_sizes})
    y = fastgan.ops.{name}(torch.randn(2, 3, {sizes}), weight)
    ```

    Args:
        input: (N, C_in, *S) or (C_in, *S) of any real floating-point dtype. PyTorch's function runs for a complex one.
        weight: {weight_shape}, dtype of the input.
        bias: (C_out,), or None.
        {entries}

    Returns:
        (N, C_out, *S') or (C_out, *S'), dtype of the input.

    Raises:
        RuntimeError, TypeError, ValueError: as in PyTorch's function.
    """
    return function  # type: ignore[no-any-return]


def _is_eligible(input: Tensor, weight: Tensor, n: int) -> bool:
    """Return whether this is a plain eager call with a real input on a known device.

    PyTorch's function handles all other calls and raises its own errors.
    """
    return (
        isinstance(input, Tensor)
        and isinstance(weight, Tensor)
        and backends.is_plain()
        and weight.ndim == n + 2
        and input.ndim in (n + 1, n + 2)
        and input.is_floating_point()
        and (input.dtype == weight.dtype or is_autocast(input.device.type))
        and backends.is_known(input.device)
        and 0 not in input.shape
    )


def _kernels_allowed() -> bool:
    return backends.forced() in ("auto", "cpu")


def _tuple(size: Size, n: int) -> tuple[int, ...]:
    if type(size) is tuple and len(size) == n:
        return size
    sizes = tuple(size) if isinstance(size, Sequence) else (operator.index(size),)
    return sizes * n if len(sizes) == 1 else sizes


def _pad(
    input: Tensor, weight: Tensor, padding: str, stride: tuple[int, ...], dilation: tuple[int, ...]
) -> tuple[Tensor, tuple[int, ...]]:
    """Return the input and the symmetric padding for a named padding. An odd total adds one element at the far side."""
    if padding == "valid":
        return input, (0,) * len(stride)
    if padding != "same":
        raise ValueError(f"padding must be numbers, 'valid' or 'same', got {padding!r}")
    if any(s != 1 for s in stride):
        raise ValueError("padding='same' is not supported for strided convolutions")
    totals = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
    if any(total % 2 for total in totals):
        input = F.pad(input, [side for total in reversed(totals) for side in (0, total % 2)])
    return input, tuple(total // 2 for total in totals)


def _autocast(input: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Apply the casts that autocast applies to a convolution, before the backward saves its tensors."""
    device = input.device.type
    if not is_autocast(device):
        return input, weight, bias
    dtype = torch.get_autocast_dtype(device)
    return _cast(input, dtype), _cast(weight, dtype), None if bias is None else _cast(bias, dtype)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.to(dtype)  # autocast does not cast float64


conv1d, conv2d, conv3d = (_conv(n) for n in (1, 2, 3))
conv_transpose1d, conv_transpose2d, conv_transpose3d = (_conv_transpose(n) for n in (1, 2, 3))
