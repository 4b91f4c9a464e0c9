"""Max pooling, adaptive average pooling and area interpolation. PyTorch's formulas propagate zeros through them.

The linear part of max pooling reads the elements at the indices of the maxima. The transposes are PyTorch's backward
operators. They take the input as an argument, but read only its shape.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastgan.ops.piecewise.autograd import Linear, Step, as_autocast, is_eligible, piecewise

aten: Any = torch.ops.aten
Function = Callable[..., Any]


def placeholder_for(input: Tensor) -> Callable[[Tensor], Tensor]:
    """Return a function that makes an uninitialized tensor with the shape of the input and the dtype of a gradient."""
    shape, stride = input.shape, input.stride()
    return lambda grad: torch.empty_strided(shape, stride, dtype=grad.dtype, device=grad.device)


def _largest(input: Tensor, dims: int, backward: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Linear:
    """Read the elements at the indices, which are flat over the last ``dims`` dimensions of the input."""
    placeholder = placeholder_for(input)

    def apply(x: Tensor, indices: Tensor) -> Tensor:
        return x.flatten(-dims).gather(-1, indices.flatten(-dims)).view(indices.shape)

    return Linear(apply, lambda y, indices: backward(y, placeholder(y), indices))


def _average(input: Tensor, output: torch.Size) -> Linear:
    placeholder, dims = placeholder_for(input), len(output)
    forward, backward = (getattr(aten, f"_adaptive_avg_pool{dims}d{end}") for end in ("", "_backward"))
    return Linear(lambda x: forward(x, output), lambda y: backward(y, placeholder(y)))


def _for_1d(images: Linear) -> Linear:
    """Apply a map of 2d images to 1d input (C, L), as images of one row."""

    def as_images(of_images: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *tensors: of_images(*(t.unsqueeze(-2) for t in tensors)).squeeze(-2)

    return Linear(*map(as_images, images))


def _sizes(dims: int, given: Any) -> list[int]:
    sizes = [operator.index(size) for size in given] if isinstance(given, Sequence) else [operator.index(given)]
    return sizes * dims if len(sizes) == 1 else sizes


def _max_pool_backward(
    dims: int,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Bind the arguments of the window, in PyTorch's order. A 1d input is an image of one row."""
    steps = kernel_size if stride is None or stride == [] or stride == () else stride
    kernel, step, pad, dilated = (_sizes(dims, size) for size in (kernel_size, steps, padding, dilation))
    if dims == 1:
        kernel, step, pad, dilated = [1, *kernel], [1, *step], [0, *pad], [1, *dilated]
    backward = aten.max_pool3d_with_indices_backward if dims == 3 else aten.max_pool2d_with_indices_backward
    return lambda grad, input, indices: backward(grad, input, kernel, step, pad, dilated, ceil_mode, indices)


def _adaptive_backward(dims: int, *args: Any, **kwargs: Any) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return aten.adaptive_max_pool3d_backward if dims == 3 else aten.adaptive_max_pool2d_backward  # type: ignore[no-any-return]


def _fractional_backward(dims: int, kernel_size: Any, *args: Any, **kwargs: Any) -> Any:
    backward = getattr(aten, f"fractional_max_pool{dims}d_backward")
    kernel = _sizes(dims, kernel_size)
    return lambda grad, input, indices: backward(grad, input, kernel, grad.shape[-dims:], indices)


def _max_pool(reference: Function, with_indices: Function, backward: Function, dims: int, casts: bool) -> Function:
    """Compute PyTorch's function (``reference``) by ``with_indices``; ``backward`` makes its backward operator."""
    returns_indices = reference is with_indices

    def route(input: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not is_eligible(input) or input.ndim not in (dims + 1, dims + 2):
            return reference(input, *args, **kwargs)

        def run(x: Tensor) -> Step:
            value, indices = with_indices(x, *args, **kwargs)
            image = x.unsqueeze(-2) if dims == 1 else x
            linear = _largest(image, max(dims, 2), backward(dims, *args, **kwargs))
            return Step(value, _for_1d(linear) if dims == 1 else linear, (indices,), indices)

        value, indices = piecewise(as_autocast(input, casts), run)
        return (value, indices) if returns_indices else value

    return route


def _average_pool(reference: Function, dims: int) -> Function:
    def route(input: Tensor, output_size: Any) -> Any:
        sizes = list(output_size) if isinstance(output_size, Sequence) else [output_size]
        if not is_eligible(input) or all(size == 1 for size in sizes):  # a mean; its gradient in PyTorch is an expand
            return reference(input, output_size)
        return _averaged(lambda x: reference(x, output_size), input, dims)

    return route


def _averaged(pool: Callable[[Tensor], Tensor], input: Tensor, dims: int) -> Any:
    def run(x: Tensor) -> Step:
        value = pool(x)
        if dims == 1:
            return Step(value, _for_1d(_average(x.unsqueeze(-2), torch.Size((1, value.shape[-1])))))
        return Step(value, _average(x, value.shape[-dims:]))

    return piecewise(as_autocast(input, casts=dims == 3), run)


def _interpolate(
    input: Tensor, size: Any = None, scale_factor: Any = None, mode: str = "nearest", *args: Any, **kwargs: Any
) -> Any:
    """``F.interpolate``. In modes other than "area" PyTorch's formulas propagate no zeros."""
    if mode != "area" or not is_eligible(input) or input.ndim not in (3, 4, 5):
        return F.interpolate(input, size, scale_factor, mode, *args, **kwargs)
    return _averaged(lambda x: F.interpolate(x, size, scale_factor, mode, *args, **kwargs), input, input.ndim - 2)


def _max_pools() -> dict[Any, Function]:
    routes: dict[Any, Function] = {}
    families = {
        "max_pool": (_max_pool_backward, (1, 2, 3)),
        "adaptive_max_pool": (_adaptive_backward, (1, 2, 3)),
        "fractional_max_pool": (_fractional_backward, (2, 3)),
    }
    for family, (backward, several) in families.items():
        for dims in several:
            name = f"{family}{dims}d"
            with_indices = getattr(F, f"{name}_with_indices")
            casts = family == "fractional_max_pool" or dims == 3
            routes[getattr(F, name)] = _max_pool(getattr(F, name), with_indices, backward, dims, casts)
            casts_indices = casts and name != "max_pool3d"  # autocast has no entry for this form of max_pool3d
            routes[with_indices] = _max_pool(with_indices, with_indices, backward, dims, casts_indices)
    for dims in (1, 2, 3):
        of_torch, with_indices = getattr(torch, f"max_pool{dims}d"), getattr(F, f"max_pool{dims}d_with_indices")
        routes[of_torch] = _max_pool(of_torch, with_indices, _max_pool_backward, dims, dims == 3)
    for pair, backward in (
        (torch.max_pool1d_with_indices, _max_pool_backward),
        (torch.adaptive_max_pool1d, _adaptive_backward),
    ):
        routes[pair] = _max_pool(pair, pair, backward, 1, False)
    return routes


ROUTES: dict[Any, Function] = {
    **_max_pools(),
    **{
        getattr(F, f"adaptive_avg_pool{dims}d"): _average_pool(getattr(F, f"adaptive_avg_pool{dims}d"), dims)
        for dims in (1, 2, 3)
    },
    F.interpolate: _interpolate,
}
