"""fastgan's operations under the signatures of StyleGAN2-ADA's and StyleGAN3's torch_utils.ops.

``impl="ref"`` runs the reference. Any other ``impl`` runs the fastest backend.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgan import ops
from fastgan.drop_in.zeros import fill_zero_grads
from fastgan.ops.conv import of_models


def _backend(impl: str) -> str | None:
    return "reference" if impl == "ref" else None


def upfirdn2d(
    x: Tensor,
    f: Tensor | None,
    up: Any = 1,
    down: Any = 1,
    padding: Any = 0,
    flip_filter: bool = False,
    gain: float = 1,
    impl: str = "cuda",
) -> Tensor:
    return ops.upfirdn2d(x, f, up, down, padding, flip_filter, float(gain), backend=_backend(impl))


def filter2d(
    x: Tensor, f: Tensor | None, padding: Any = 0, flip_filter: bool = False, gain: float = 1, impl: str = "cuda"
) -> Tensor:
    return ops.filter2d(x, f, padding, flip_filter, float(gain), backend=_backend(impl))


def upsample2d(
    x: Tensor,
    f: Tensor | None,
    up: Any = 2,
    padding: Any = 0,
    flip_filter: bool = False,
    gain: float = 1,
    impl: str = "cuda",
) -> Tensor:
    return ops.upsample2d(x, f, up, padding, flip_filter, float(gain), backend=_backend(impl))


def downsample2d(
    x: Tensor,
    f: Tensor | None,
    down: Any = 2,
    padding: Any = 0,
    flip_filter: bool = False,
    gain: float = 1,
    impl: str = "cuda",
) -> Tensor:
    return ops.downsample2d(x, f, down, padding, flip_filter, float(gain), backend=_backend(impl))


def bias_act(
    x: Tensor,
    b: Tensor | None = None,
    dim: int = 1,
    act: str = "linear",
    alpha: float | None = None,
    gain: float | None = None,
    clamp: float | None = None,
    impl: str = "cuda",
) -> Tensor:
    y = ops.bias_act(
        x,
        None if b is None else b.to(x.dtype),
        activation=act,
        dim=dim,
        negative_slope=0.2 if alpha is None else float(alpha),
        gain=None if gain is None else float(gain),
        clamp=None if clamp is None or clamp < 0 else float(clamp),
        backend=_backend(impl),
    )
    return fill_zero_grads(y) if act in ("relu", "lrelu") and impl != "ref" else y


def filtered_lrelu(
    x: Tensor,
    fu: Tensor | None = None,
    fd: Tensor | None = None,
    b: Tensor | None = None,
    up: Any = 1,
    down: Any = 1,
    padding: Any = 0,
    gain: float = 2**0.5,
    slope: float = 0.2,
    clamp: float | None = None,
    flip_filter: bool = False,
    impl: str = "cuda",
) -> Tensor:
    b = None if b is None else b.to(x.dtype)
    limit = None if clamp is None else float(clamp)
    options: dict[str, Any] = {"gain": float(gain), "slope": float(slope), "clamp": limit, "flip_filter": flip_filter}
    y = ops.filtered_lrelu(x, fu, fd, b, up, down, padding, **options, backend=_backend(impl))
    return y if impl == "ref" else fill_zero_grads(y)


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    return of_models.conv2d(input, weight, bias, stride, padding, dilation, groups)


def conv_transpose2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Tensor:
    return of_models.conv_transpose2d(input, weight, bias, stride, padding, output_padding, groups, dilation)


def conv2d_resample(
    x: Tensor,
    w: Tensor,
    f: Tensor | None = None,
    up: int = 1,
    down: int = 1,
    padding: Any = 0,
    groups: int = 1,
    flip_weight: bool = True,
    flip_filter: bool = False,
) -> Tensor:
    return ops.conv2d_resample(x, w, f, up, down, padding, groups, flip_weight, flip_filter)


def grid_sample(input: Tensor, grid: Tensor) -> Tensor:
    return ops.grid_sample(input, grid, align_corners=False)


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a * b + c"""
    return torch.addcmul(c, a, b)
