"""Distances between points, d_ij = |x_i - y_j|_p, with derivatives of every order.

PyTorch's kernels compute d and its first derivative, gx_i = sum_j g_ij w_ij with w = d|x_i - y_j|_p / dx_i. The second
derivative differentiates that formula: with matrix products for p = 2, and in tiles of rows for other p, so that the
differences (P, R, M) are never in memory at once. The derivatives of a distance of zero are zero.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf, prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastgan.ops.higher_orders import Operands, double_backward
from fastgan.ops.lacking.empty import constant_in

_FEW = 25  # points, up to which PyTorch computes no distances by products
_TILE = 2**21  # differences per tile
_DEFAULT_MODE = "use_mm_for_euclid_dist_if_necessary"
aten: Any = torch.ops.aten


def cdist(x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: str = _DEFAULT_MODE) -> Tensor:
    """``torch.cdist``."""
    if not (x1.requires_grad or x2.requires_grad):
        return torch.cdist(x1, x2, p, compute_mode)
    if 0 in (*x1.shape, *x2.shape):
        return constant_in(torch.cdist(x1.detach(), x2.detach(), p, compute_mode), x1, x2)
    if torch.is_autocast_enabled(x1.device.type):  # autocast computes distances in float32
        x1, x2 = (x.float() if x.dtype.itemsize < 4 else x for x in (x1, x2))
        with torch.autocast(x1.device.type, enabled=False):
            return cdist(x1, x2, p, compute_mode)
    with torch.no_grad():
        value = torch.cdist(x1, x2, p, compute_mode)  # raises PyTorch's own errors
    batch = value.shape[:-2]
    flat = [x.expand(*batch, *x.shape[-2:]).reshape(prod(batch), *x.shape[-2:]) for x in (x1, x2)]
    result: Tensor = _Cdist.apply(*flat, float(p), value.reshape(prod(batch), *value.shape[-2:]))  # type: ignore[no-untyped-call]
    return result.view(value.shape)


def pdist(input: Tensor, p: float = 2.0) -> Tensor:
    """``torch.pdist``."""
    if not input.requires_grad or input.ndim != 2:
        return torch.pdist(input, p)
    if 0 in input.shape or len(input) == 1:
        return constant_in(torch.pdist(input.detach(), p), input)
    row, column = torch.triu_indices(len(input), len(input), 1, device=input.device)
    return cdist(input, input, p, "donot_use_mm_for_euclid_dist")[row, column]


def pairwise_distance(x1: Tensor, x2: Tensor, p: float = 2.0, eps: float = 1e-6, keepdim: bool = False) -> Tensor:
    """``F.pairwise_distance``."""
    if not (x1.requires_grad or x2.requires_grad):
        return F.pairwise_distance(x1, x2, p, eps, keepdim)
    norm: Tensor = _Norm.apply(x1 - x2 + eps, float(p))  # type: ignore[no-untyped-call]
    return norm if keepdim else norm.squeeze(-1)


ROUTES: dict[Any, Callable[..., Any]] = {
    torch.cdist: cdist,
    **dict.fromkeys((F.pdist, torch.pdist), pdist),
    **dict.fromkeys((F.pairwise_distance, torch.pairwise_distance), pairwise_distance),
}


class _Cdist(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, p: float, value: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, y, value)
        ctx.p, ctx.exact = p, None
        return value.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, Tensor | None, None, None]:
        if g is None:
            return None, None, None, None
        x, y, value = ctx.saved_tensors
        if ctx.p == 2:
            if ctx.exact is None:  # the value from products is not zero for equal points
                ctx.exact = torch.cdist(x.detach(), y.detach(), 2.0, "donot_use_mm_for_euclid_dist")
            value = ctx.exact
        by_x, by_y = _CdistBackward.apply(g, x, y, ctx.p, value, *ctx.needs_input_grad[:2])  # type: ignore[no-untyped-call]
        return by_x, by_y, None, None


class _CdistBackward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, g: Tensor, x: Tensor, y: Tensor, p: float, value: Tensor, of_x: bool, of_y: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(g, x, y, value)
        ctx.p = p
        if p == 2 and max(x.shape[-2], y.shape[-2]) > _FEW:
            products = _first_by_products(g, x, y, value)
            return products[0] if of_x else None, products[1] if of_y else None
        g, x, y = (t.contiguous() for t in (g, x, y))
        by_x = aten._cdist_backward(g, x, y, p, value) if of_x else None
        if not of_y:
            return by_x, None
        g, value = (t.transpose(-1, -2).contiguous() for t in (g, value))
        return by_x, aten._cdist_backward(g, y, x, p, value)

    @staticmethod
    def backward(ctx: Any, hx: Tensor | None, hy: Tensor | None) -> tuple[Tensor | None, ...]:
        g, x, y, d = ctx.saved_tensors
        if (hx is None and hy is None) or ctx.p == 0:  # p = 0 counts differences, and its derivative is zero
            return (None,) * 7
        if ctx.p == 2 and not torch.is_grad_enabled():
            return *_second_by_products(g, x, y, d, hx, hy), None, None, None, None
        second = _by_products if ctx.p == 2 else _by_tiles
        return *second(g, x, y, ctx.p, hx, hy), None, None, None, None


def _first_by_products(g: Tensor, x: Tensor, y: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """p = 2: with W = g / d, gx = rowsum(W) x - W y and gy = colsum(W) y - W^T x."""
    weights = (g / d.masked_fill(d == 0, inf)).to(g.dtype)
    x, y = _centered(x, y)
    by_x = weights.sum(-1).unsqueeze(-1) * x - weights @ y
    return by_x, weights.sum(-2).unsqueeze(-1) * y - weights.mT @ x


def _second_by_products(
    g: Tensor, x: Tensor, y: Tensor, d: Tensor, hx: Tensor | None, hy: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """p = 2: the derivatives of <hx, gx> + <hy, gy> = sum_ij g_ij s_ij / d_ij, s_ij = <hx_i - hy_j, x_i - y_j>.

    With V = g s / d^3, that with respect to x is rowsum(W) hx - W hy - rowsum(V) x + V y, and likewise for y.
    """
    x, y = _centered(x, y)
    inverse = 1 / d.masked_fill(d == 0, inf)
    weights = g * inverse
    s: Any = 0
    if hx is not None:
        s = (hx * x).sum(-1, keepdim=True) - hx @ y.mT
    if hy is not None:
        s = s + (hy * y).sum(-1).unsqueeze(-2) - x @ hy.mT
    by_g = s * inverse
    curved = by_g * weights * inverse
    by_x = curved @ y - curved.sum(-1).unsqueeze(-1) * x
    by_y = curved.mT @ x - curved.sum(-2).unsqueeze(-1) * y
    if hx is not None:
        by_x += weights.sum(-1).unsqueeze(-1) * hx
        by_y -= weights.mT @ hx
    if hy is not None:
        by_x -= weights @ hy
        by_y += weights.sum(-2).unsqueeze(-1) * hy
    return by_g, by_x, by_y


def _centered(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Move the points to the origin. Far from it, differences of products lose precision."""
    center = x.detach().mean(-2, keepdim=True)
    return x - center, y - center


def _by_products(
    g: Tensor, x: Tensor, y: Tensor, p: float, hx: Tensor | None, hy: Tensor | None
) -> list[Tensor | None]:
    """p = 2, with derivatives of every order."""

    def backward(g: Tensor, x: Tensor, y: Tensor) -> list[Tensor]:
        return [*_first_by_products(g, x, y, cdist(x, y, 2.0, "donot_use_mm_for_euclid_dist"))]

    return _differentiated(backward, [g, x, y], [hx, hy])


def _by_tiles(g: Tensor, x: Tensor, y: Tensor, p: float, hx: Tensor | None, hy: Tensor | None) -> list[Tensor | None]:
    def backward(g: Tensor, x: Tensor, y: Tensor) -> list[Tensor]:
        products = g.unsqueeze(-1) * _slopes(x.unsqueeze(-2) - y.unsqueeze(-3), p)  # (B, P, R, M)
        return [products.sum(-2), -products.sum(-3)]

    rows = max(1, _TILE // (len(x) * y.shape[-2] * y.shape[-1]))
    by_g, by_x, by_y = [], [], []
    for start in range(0, x.shape[-2], rows):
        tile = slice(start, start + rows)
        operands: Operands = [g[:, tile], x[:, tile], y]
        of_g, of_x, of_y = _differentiated(backward, operands, [None if hx is None else hx[:, tile], hy])
        by_g.append(of_g)
        by_x.append(of_x)
        by_y.append(of_y)
    return [_joined(by_g), _joined(by_x), _summed(by_y)]


def _differentiated(backward: Callable[..., list[Tensor]], operands: Operands, grads: Operands) -> list[Tensor | None]:
    if torch.is_grad_enabled():
        return double_backward(backward, operands, grads)
    leaves = [t.detach().requires_grad_(t.requires_grad) for t in operands if t is not None]
    with torch.enable_grad():
        found = double_backward(backward, leaves, grads)
    return [None if t is None else t.detach() for t in found]


def _joined(parts: list[Tensor | None]) -> Tensor | None:
    found = [part for part in parts if part is not None]
    return torch.cat(found, 1) if found else None


def _summed(parts: list[Tensor | None]) -> Tensor | None:
    found = [part for part in parts if part is not None]
    return torch.stack(found).sum(0) if found else None


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, difference: Tensor, p: float) -> Tensor:
        ctx.save_for_backward(difference)
        ctx.p = p
        norm: Tensor = torch.linalg.vector_norm(difference, p, -1, keepdim=True)
        return norm

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        (difference,) = ctx.saved_tensors
        return g * _slopes(difference, ctx.p), None


def _slopes(difference: Tensor, p: float) -> Tensor:
    """Return the derivative of the norm over the last dimension, sign(a) (|a| / |.|_p)^(p - 1).

    It is zero if a or the norm is zero. For p = inf, all elements that tie for the largest get a derivative.
    """
    sign = difference.sign()
    size = difference.abs()
    if p == 0:
        return torch.zeros_like(difference)
    if p == 1:
        return sign
    if p == inf:
        return sign * (size == size.amax(-1, keepdim=True))
    zero = size == 0
    size = size.masked_fill(zero, 1)
    powers = size.pow(p).masked_fill(zero, 0).sum(-1, keepdim=True)
    norm = powers.masked_fill(powers == 0, 1).pow(1 / p)
    return sign * (size / norm).pow(p - 1)  # the sign is 0 if a is 0
