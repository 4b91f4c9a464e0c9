"""grid_sample, which is linear in the image. Its backward is its transpose, to any order."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastgan import backends
from fastgan.ops.library import is_batched, stored, visible

__all__ = ["grid_sample"]

_MODES = {"bilinear": 0, "nearest": 1}  # the codes that PyTorch's operators expect
_PADDING = {"zeros": 0, "border": 1, "reflection": 2}
_Options = tuple[int, int, bool]


@visible
def grid_sample(
    input: Tensor, grid: Tensor, mode: str = "bilinear", padding_mode: str = "zeros", align_corners: bool | None = None
) -> Tensor:
    """Drop-in for ``torch.nn.functional.grid_sample`` with the same arguments, results and errors.

    Order of derivative: any, if the grid is constant. The backward is the transpose, and its backward samples again. It
    allows one pass. PyTorch's function runs for volumes, mode "bicubic", and a grid that requires a gradient.

    ```python
    import torch
    import fastgan

    turned = torch.tensor([[[0.0, -1.0, 0.0], [1.0, 0.0, 0.0]]])
    grid = torch.nn.functional.affine_grid(turned, (1, 3, 8, 8), align_corners=False)
    y = fastgan.ops.grid_sample(torch.randn(1, 3, 8, 8), grid, align_corners=False)
    ```

    Args:
        input: (N, C, H, W), floating-point.
        grid: (N, H', W', 2), dtype of the input: positions (x, y) from -1 to 1.
        mode: "bilinear", "nearest" or "bicubic".
        padding_mode: values outside of the image: "zeros", "border" or "reflection".
        align_corners: whether -1 and 1 are the centers of the corner pixels, or their outer corners.

    Returns:
        (N, C, H', W'), dtype of the input.

    Raises:
        RuntimeError, TypeError, ValueError: as in PyTorch's function.
    """
    supported = (
        isinstance(input, Tensor)
        and isinstance(grid, Tensor)
        and input.ndim == 4
        and mode in _MODES
        and padding_mode in _PADDING
        and input.requires_grad
        and not grid.requires_grad
        and backends.is_plain()
        and backends.is_known(input.device)
        and not torch.compiler.is_compiling()
    )
    if not supported:
        return F.grid_sample(input, grid, mode, padding_mode, align_corners)
    with torch.no_grad():  # for PyTorch's errors, its warning about align_corners, and the dtypes under autocast
        sampled = F.grid_sample(input, grid, mode, padding_mode, align_corners)
    options = _MODES[mode], _PADDING[padding_mode], bool(align_corners)
    run: Any = _Sample.apply
    result: Tensor = run(input.to(sampled.dtype), grid.to(sampled.dtype), options, sampled)
    return result


def _sample(input: Tensor, grid: Tensor, options: _Options) -> Tensor:
    return torch.grid_sampler(input, grid, *options)


class _Sample(torch.autograd.Function):
    piecewise_affine = True

    @staticmethod
    def forward(ctx: Any, input: Tensor, grid: Tensor, options: _Options, sampled: Tensor | None = None) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(grid)
        ctx.options, ctx.shape = options, input.shape
        return _sample(input, grid, options) if sampled is None else sampled

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, None, None, None]:
        if grad is None:
            return None, None, None, None
        run: Any = _Transpose.apply if torch.is_grad_enabled() and not is_batched(grad) else _transpose
        return run(grad, *ctx.saved_tensors, ctx.options, ctx.shape), None, None, None


def _transpose(grad: Tensor, grid: Tensor, options: _Options, shape: torch.Size) -> Tensor:
    placeholder = grid.new_zeros(1, dtype=grad.dtype).expand(shape)  # only its shape is read
    backward: Any = torch.ops.aten.grid_sampler_2d_backward.default
    return backward(stored(grad), placeholder, grid, *options, [True, False])[0]  # type: ignore[no-any-return]


class _Transpose(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, grad: Tensor, grid: Tensor, options: _Options, shape: torch.Size) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(grid)
        ctx.options = options
        return _transpose(grad, grid, options, shape)

    @staticmethod
    def backward(ctx: Any, h: Tensor | None) -> tuple[Tensor | None, None, None, None]:
        if h is None:
            return None, None, None, None
        (grid,) = ctx.saved_tensors
        by_grad = (
            _Sample.apply(h, grid, ctx.options)  # type: ignore[no-untyped-call]
            if torch.is_grad_enabled()
            else torch.grid_sampler(h, grid, *ctx.options)
        )
        return by_grad, None, None, None
