"""avg_pool1d, avg_pool2d and avg_pool3d. They are linear, so the double backward sends no gradient to the input.

PyTorch's pooling runs except in one case: on a CPU, a fastgan kernel pools a contiguous input with windows that tile
it, such as those that halve an image. PyTorch's kernel processes one element after another there.
``use_backend("reference")`` turns the kernel off.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastgan import backends
from fastgan.ops.library import is_eager, stored, symbolic
from fastgan.ops.pool import native_kernels

__all__ = ["avg_pool1d", "avg_pool2d", "avg_pool3d"]

Size = int | Sequence[int]

_DTYPES = frozenset({torch.float32, torch.float64, torch.float16, torch.bfloat16})
_LEAST = 4096  # elements; below this number a kernel call costs more than it saves


@symbolic
def avg_pool1d(
    input: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
) -> Tensor:
    """Drop-in for ``torch.nn.functional.avg_pool1d`` with the same arguments, results and errors.

    Order of derivative: any. See `avg_pool2d`.

    ```python
    import torch
    import fastgan

    y = fastgan.ops.avg_pool1d(torch.randn(2, 3, 16), 2)
    ```

    Args:
        input: (N, C, L) or (C, L), floating-point. PyTorch's function runs for other dtypes.
        kernel_size: size of the window.
        stride: stride of the window. None: ``kernel_size``.
        padding: zero padding on both sides.
        ceil_mode: round the output size up.
        count_include_pad: count the padding in the averages.

    Returns:
        (N, C, L'), dtype of the input.

    Raises:
        RuntimeError, TypeError, ValueError: as in PyTorch's function.
    """
    if not isinstance(input, Tensor) or input.ndim not in (2, 3):
        return F.avg_pool1d(input, kernel_size, stride, padding, ceil_mode, count_include_pad)  # type: ignore[arg-type]
    kernel, step, pad = (_sizes(1, size) for size in (kernel_size, kernel_size if stride is None else stride, padding))
    flat = avg_pool2d(input.unsqueeze(-2), (1, *kernel), (1, *step), (0, *pad), ceil_mode, count_include_pad)
    return flat.squeeze(-2)  # (N, C, L')


@symbolic
def avg_pool2d(
    input: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """Drop-in for ``torch.nn.functional.avg_pool2d`` with the same arguments, results and errors.

    Order of derivative: any. It saves only the shape and strides of the input. In a double backward, no gradient flows
    to ``input``, whereas PyTorch propagates zeros.

    ```python
    import torch
    import fastgan

    y = fastgan.ops.avg_pool2d(torch.randn(2, 3, 16, 16), 2)
    ```

    Args:
        input: (N, C, H, W) or (C, H, W), floating-point. PyTorch's function runs for other dtypes.
        kernel_size: size of the window, one number or one per dimension.
        stride: stride of the window. None: ``kernel_size``.
        padding: zero padding on both sides of each dimension.
        ceil_mode: round the output sizes up.
        count_include_pad: count the padding in the averages.
        divisor_override: divisor of the sums. None: the number of elements in the window.

    Returns:
        (N, C, H', W'), dtype of the input.

    Raises:
        RuntimeError, TypeError, ValueError: as in PyTorch's function.
    """
    return _pool(2, input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)


@symbolic
def avg_pool3d(
    input: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """Drop-in for ``torch.nn.functional.avg_pool3d`` with the same arguments, results and errors.

    Order of derivative: any. See `avg_pool2d`.

    ```python
    import torch
    import fastgan

    y = fastgan.ops.avg_pool3d(torch.randn(2, 3, 8, 8, 8), 2)
    ```

    Args:
        input: (N, C, D, H, W) or (C, D, H, W), floating-point. PyTorch's function runs for other dtypes.
        kernel_size: size of the window, one number or one per dimension.
        stride: stride of the window. None: ``kernel_size``.
        padding: zero padding on both sides of each dimension.
        ceil_mode: round the output sizes up.
        count_include_pad: count the padding in the averages.
        divisor_override: divisor of the sums. None: the number of elements in the window.

    Returns:
        (N, C, D', H', W'), dtype of the input.

    Raises:
        RuntimeError, TypeError, ValueError: as in PyTorch's function.
    """
    return _pool(3, input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)


class _Window(NamedTuple):
    """The arguments of the ``aten`` pooling operators."""

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    ceil_mode: bool
    count_include_pad: bool
    divisor_override: int | None


def _pool(n: int, input: Tensor, kernel_size: Size, stride: Size | None, padding: Size, *rest: Any) -> Tensor:
    is_eligible = isinstance(input, Tensor) and input.is_floating_point() and input.numel() > 0
    if not (is_eligible and input.ndim in (n + 1, n + 2) and backends.is_plain() and backends.is_known(input.device)):
        reference: Any = F.avg_pool2d if n == 2 else F.avg_pool3d
        return reference(input, kernel_size, stride, padding, *rest)  # type: ignore[no-any-return]
    if input.ndim == n + 1:
        return _pool(n, input.unsqueeze(0), kernel_size, stride, padding, *rest).squeeze(0)
    if n == 3 and input.is_cpu and torch.is_autocast_enabled("cpu"):  # autocast pools in float32
        input = input.to(torch.promote_types(input.dtype, torch.float32))
    kernel, step, pad = (_sizes(n, size) for size in (kernel_size, kernel_size if stride is None else stride, padding))
    window = _Window(kernel, step, pad, *rest)
    pooled: Tensor = _Pool.apply(input, window, _is_tiled(input, window))  # type: ignore[no-untyped-call]
    return pooled


def _sizes(n: int, given: Size) -> tuple[int, ...]:
    sizes = tuple(map(operator.index, given)) if isinstance(given, Sequence) else (operator.index(given),)
    return sizes * n if len(sizes) == 1 else sizes


def _is_tiled(input: Tensor, window: _Window) -> bool:
    """Return whether the kernel pools this input. If so, kernels compute its derivatives too."""
    kernel, sizes = window.kernel_size, input.shape[2:]
    return (
        input.device.type == "cpu"
        and is_eager(input)
        and input.numel() >= _LEAST
        and input.is_contiguous()
        and input.dtype in _DTYPES
        and kernel == window.stride
        and not any(window.padding)
        and window.divisor_override != 0  # PyTorch raises its own error for 0
        and len(kernel) == len(sizes)
        and all(width > 0 and size % width == 0 for size, width in zip(sizes, kernel, strict=True))
        and backends.forced() in ("auto", "cpu")
        and backends.native() is not None
    )


_POOL: dict[int, Any] = {4: torch.ops.aten.avg_pool2d.default, 5: torch.ops.aten.avg_pool3d.default}
_TRANSPOSE: dict[int, Any] = {
    4: torch.ops.aten.avg_pool2d_backward.default,
    5: torch.ops.aten.avg_pool3d_backward.default,
}


def _forward(input: Tensor, window: _Window, tiled: bool) -> Tensor:
    if tiled and is_eager(input):
        return native_kernels.pool(stored(input).contiguous(), window.kernel_size, window.divisor_override)
    return _POOL[input.ndim](input, *window)  # type: ignore[no-any-return]


def _transpose(grad: Tensor, window: _Window, tiled: bool, shape: torch.Size, stride: tuple[int, ...]) -> Tensor:
    if tiled and is_eager(grad):
        grad = stored(grad).contiguous()
        return native_kernels.transpose(grad, shape, window.kernel_size, window.divisor_override)
    placeholder = torch.empty_strided(shape, stride, dtype=grad.dtype, device=grad.device)  # only its shape is read
    return _TRANSPOSE[grad.ndim](grad, placeholder, *window)  # type: ignore[no-any-return]


class _Pool(torch.autograd.Function):
    """Average pooling. Its backward is its transpose, and the backward of the transpose is the pooling itself."""

    piecewise_affine = True
    fills_zeros = (0,)

    @staticmethod
    def forward(ctx: Any, input: Tensor, window: _Window, tiled: bool) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.arguments = window, tiled, input.shape, input.stride()
        return _forward(input, window, tiled)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, None, None]:
        if grad is None:
            return None, None, None
        # Without create_graph the backward needs no graph of its own.
        run: Any = _Transpose.apply if torch.is_grad_enabled() else _transpose
        return run(grad, *ctx.arguments), None, None


class _Transpose(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, grad: Tensor, window: _Window, tiled: bool, *of_input: Any) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.arguments = window, tiled
        return _transpose(grad, window, tiled, *of_input)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 5
        run: Any = _Pool.apply if torch.is_grad_enabled() else _forward
        return run(grad, *ctx.arguments), None, None, None, None
