"""Spectral normalization in pure PyTorch: the reference, the fallback and the benchmark's baseline."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fastgan.ops.library import accumulation_dtype, without_autocast
from fastgan.ops.spectral_norm.layout import as_matrix


def spectral_norm(
    weights: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    dims: Sequence[int],
    n_power_iterations: int,
    eps: float,
    v_first: bool,
) -> list[Tensor]:
    """Compute weight / sigma for each weight, differentiable to any order.

    If n_power_iterations > 0, u and v are updated in place.
    """
    return [
        _one(w, u, v, dim, n_power_iterations, eps, v_first) for w, u, v, dim in zip(weights, us, vs, dims, strict=True)
    ]


def _one(weight: Tensor, u: Tensor, v: Tensor, dim: int, n: int, eps: float, v_first: bool) -> Tensor:
    acc = accumulation_dtype(weight.dtype)
    with without_autocast(weight.device.type):
        matrix = as_matrix(weight, dim).to(acc)  # (rows, columns)
        with torch.no_grad():
            # Copies: a backward must use the u and v of its own forward, even if another forward has updated them.
            new_u, new_v = u.to(acc, copy=True), v.to(acc, copy=True)
            for _ in range(n):
                if v_first:
                    new_v = F.normalize(matrix.mT @ new_u, dim=0, eps=eps)
                    new_u = F.normalize(matrix @ new_v, dim=0, eps=eps)
                else:
                    new_u = F.normalize(matrix @ new_v, dim=0, eps=eps)
                    new_v = F.normalize(matrix.mT @ new_u, dim=0, eps=eps)
            if n > 0:
                u.copy_(new_u)
                v.copy_(new_v)
        sigma = torch.dot(new_u, matrix @ new_v)
        return (weight.to(acc) / sigma).to(weight.dtype)


def double_backward(
    grad_of_grad_weight: Tensor, grad: Tensor, weight: Tensor, sigma: Tensor, u: Tensor, v: Tensor, dim: int
) -> tuple[Tensor, Tensor]:
    """Differentiate <H, dW> with respect to G and W, where dW = G / sigma - (<G, W> / sigma^2) u v^T.

    With beta = u^T H v / sigma^2, and sigma a function of W:
        by G: H / sigma - beta W
        by W: (2 beta <G, W> / sigma - <H, G> / sigma^2) u v^T - beta G
    """
    acc = sigma.dtype
    h, g, w = (as_matrix(x, dim).to(acc) for x in (grad_of_grad_weight, grad, weight))  # (rows, columns)
    beta = torch.dot(u, h @ v) / sigma**2
    rank_one = torch.outer(u, v)
    by_grad = h / sigma - beta * w
    by_weight = (2 * beta * (g * w).sum() / sigma - (h * g).sum() / sigma**2) * rank_one - beta * g
    return _from_matrix(by_grad, weight, dim), _from_matrix(by_weight, weight, dim)


def _from_matrix(matrix: Tensor, weight: Tensor, dim: int) -> Tensor:
    moved = weight.movedim(dim, 0)
    return matrix.to(weight.dtype).reshape(moved.shape).movedim(0, dim)
