"""The lengths of StyleGAN2's paths: norms of the gradient in the latents of a generator's images times noise."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgan.ops.gradient_penalty.norms import norms
from fastgan.ops.gradient_penalty.paths import paths
from fastgan.ops.gradient_penalty.zeros import leave_zeros


def path_lengths(images: Tensor, latents: Tensor, noise: Tensor) -> Tensor:
    """|J^T noise| of each sample (N,), differentiable once.

    Args:
        images: (N, ...), made from ``latents``.
        latents: (N, D), or (N, L, D), whose squared lengths are the mean over L of the sums over D.
        noise: the cotangent of ``images``.
    """
    (grad,) = torch.autograd.grad(images, latents, noise, create_graph=True, allow_unused=True)
    if grad is None:
        raise ValueError("the images do not depend on the latents: pass the very tensor that the generator was given")
    lengths = norms([grad], None, squared=False)
    if latents.ndim == 3:
        lengths = lengths / latents.shape[1] ** 0.5
    return leave_zeros(lengths, paths([images], latents), [latents])
