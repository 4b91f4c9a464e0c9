"""The path lengths of StyleGAN2: norms of the gradient of <images, noise> with respect to the latents."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgan.ops import regions
from fastgan.ops.gradient_penalty.compiled import refuse_opaque
from fastgan.ops.gradient_penalty.norms import norms
from fastgan.ops.gradient_penalty.paths import paths
from fastgan.ops.gradient_penalty.zeros import fill_zeros


def path_lengths(images: Tensor, latents: Tensor, noise: Tensor) -> Tensor:
    """Return |J^T noise| for each sample, (N,). It can be differentiated once.

    Args:
        images: (N, ...), computed from ``latents``.
        latents: (N, D) or (N, L, D). For (N, L, D), the squared length is the sum over D and the mean over L.
        noise: the cotangent of ``images``.
    """
    grad = (_in_graph if regions.is_entered() else _gradient)(images, latents, noise)
    lengths = norms([grad], None, squared=False)
    return lengths / latents.shape[1] ** 0.5 if latents.ndim == 3 else lengths


def _gradient(images: Tensor, latents: Tensor, noise: Tensor) -> Tensor:
    (grad,) = torch.autograd.grad(images, latents, noise, create_graph=True, allow_unused=True)
    if grad is None:
        raise ValueError(
            "the images do not depend on the latents: pass the same tensor that was passed to the generator"
        )
    path = paths([images], latents)
    if torch.compiler.is_compiling():
        refuse_opaque(path)
    return fill_zeros(grad, path, [latents], [grad])


@regions.in_graph
def _in_graph(images: Tensor, latents: Tensor, noise: Tensor) -> Tensor:
    if regions.is_rehearsal():
        return torch.zeros_like(latents) + 0 * images.sum().to(latents.dtype)
    with regions.lowering():
        return _gradient(images, latents, noise)
