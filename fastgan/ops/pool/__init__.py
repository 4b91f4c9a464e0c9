"""avg_pool1d, avg_pool2d, avg_pool3d: linear, so that their second derivative is nothing at all, not zeros.

Windows that tile a contiguous input, as those that halve an image do, are a kernel's on the CPU, where PyTorch's walks
one element after another; of all others PyTorch's own runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastgan import backends
from fastgan.ops.library import is_eager
from fastgan.ops.pool import native_kernels

__all__ = ["avg_pool1d", "avg_pool2d", "avg_pool3d"]

Size = int | Sequence[int]

_DTYPES = frozenset({torch.float32, torch.float64, torch.float16, torch.bfloat16})
_LEAST = 4096  # elements, under which calling a kernel costs more than it brings
backends.register("avg_pool", dict.fromkeys(("reference", "cpu"), _DTYPES))


def avg_pool1d(
    input: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
) -> Tensor:
    """``torch.nn.functional.avg_pool1d``: as `avg_pool2d`, of input (N, C, L)."""
    if input.ndim != 3:
        return F.avg_pool1d(input, kernel_size, stride, padding, ceil_mode, count_include_pad)  # type: ignore[arg-type]
    kernel, step, pad = _sizes(1, kernel_size, stride, padding)
    flat = avg_pool2d(input[:, :, None], (1, *kernel), (1, *step), (0, *pad), ceil_mode, count_include_pad)
    return flat[:, :, 0]  # (N, C, L')


def avg_pool2d(
    input: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """``torch.nn.functional.avg_pool2d``: same arguments, results and errors.

    Keeps nothing of the input but its shape. No gradient flows to ``input`` through the derivative, where PyTorch sends
    zeros. Differentiable to any order.

    Args:
        input: (N, C, H, W), floating; of other shapes PyTorch's own runs.
    """
    return _pool(2, input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)


def avg_pool3d(
    input: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """``torch.nn.functional.avg_pool3d``: as `avg_pool2d`, of input (N, C, D, H, W)."""
    return _pool(3, input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)


class _Window(NamedTuple):
    """As the ``aten`` operators take it."""

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    ceil_mode: bool
    count_include_pad: bool
    divisor_override: int | None


def _pool(n: int, input: Tensor, kernel_size: Size, stride: Size | None, padding: Size, *rest: Any) -> Tensor:
    plainly = input.ndim == n + 2 and input.is_floating_point() and input.numel() > 0
    if not plainly or backends.in_transform():
        plain: Any = F.avg_pool2d if n == 2 else F.avg_pool3d
        return plain(input, kernel_size, stride, padding, *rest)  # type: ignore[no-any-return]
    kernel, step, pad = _sizes(n, kernel_size, stride, padding)
    window = _Window(kernel, step, pad, *rest)
    pooled: Tensor = _Pool.apply(input, window)  # type: ignore[no-untyped-call]
    return pooled


def _sizes(n: int, kernel_size: Size, stride: Size | None, padding: Size) -> tuple[tuple[int, ...], ...]:
    given = (kernel_size, kernel_size if stride is None else stride, padding)
    return tuple((size,) * n if isinstance(size, int) else tuple(size) for size in given)


def _is_tiled(tensor: Tensor, shape: torch.Size, stride: tuple[int, ...], window: _Window) -> bool:
    """Whether the kernel takes an input of this shape and stride, of which ``tensor`` is one or has the gradient."""
    sizes = shape[2:]
    return (
        tensor.device.type == "cpu"
        and shape.numel() >= _LEAST
        and window.kernel_size == window.stride
        and not any(window.padding)
        and window.divisor_override != 0  # PyTorch's error
        and all(size % width == 0 for size, width in zip(sizes, window.kernel_size, strict=True))
        and is_eager(tensor)
        and _is_contiguous(shape, stride)
        and backends.forced() in ("auto", "cpu")
        and backends.why_not("avg_pool", "cpu", "cpu", tensor.dtype) is None
    )


def _is_contiguous(shape: torch.Size, stride: tuple[int, ...]) -> bool:
    step = 1
    for size, own in zip(reversed(shape), reversed(stride), strict=True):
        if size > 1 and own != step:
            return False
        step *= size
    return True


_POOL: dict[int, Any] = {4: torch.ops.aten.avg_pool2d.default, 5: torch.ops.aten.avg_pool3d.default}
_TRANSPOSE: dict[int, Any] = {
    4: torch.ops.aten.avg_pool2d_backward.default,
    5: torch.ops.aten.avg_pool3d_backward.default,
}


def _forward(input: Tensor, window: _Window) -> Tensor:
    if _is_tiled(input, input.shape, input.stride(), window):
        return native_kernels.pool(input, window.kernel_size, window.divisor_override)
    return _POOL[input.ndim](input, *window)  # type: ignore[no-any-return]


def _transpose(grad: Tensor, window: _Window, shape: torch.Size, stride: tuple[int, ...]) -> Tensor:
    if _is_tiled(grad, shape, stride, window):
        return native_kernels.transpose(grad.contiguous(), shape, window.kernel_size, window.divisor_override)
    unread = torch.empty_strided(shape, stride, dtype=grad.dtype, device=grad.device)  # asked for its shape
    return _TRANSPOSE[grad.ndim](grad, unread, *window)  # type: ignore[no-any-return]


class _Pool(torch.autograd.Function):
    """Linear: its derivative is its transpose, whose derivative it is."""

    piecewise_affine = True

    @staticmethod
    def forward(ctx: Any, input: Tensor, window: _Window) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.window, ctx.shape, ctx.stride = window, input.shape, input.stride()
        return _forward(input, window)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, None]:
        if grad is None:
            return None, None
        # Without create_graph nothing will be asked of the backward's own graph.
        run: Any = _Transpose.apply if torch.is_grad_enabled() else _transpose
        return run(grad, ctx.window, ctx.shape, ctx.stride), None


class _Transpose(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, grad: Tensor, window: _Window, shape: torch.Size, stride: tuple[int, ...]) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.window = window
        return _transpose(grad, window, shape, stride)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, None, None, None]:
        if grad is None:
            return None, None, None, None
        run: Any = _Pool.apply if torch.is_grad_enabled() else _forward
        return run(grad, ctx.window), None, None, None
