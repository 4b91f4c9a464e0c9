"""StyleGAN2's regularization of a generator, as a module that holds the average length."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor, distributed, nn

from fastgan.ops.gradient_penalty.path_length import path_lengths
from fastgan.ops.library import untraced
from fastgan.ops.minibatch_discrimination.ranks import Group


class PathLengthPenalty(nn.Module):
    """Path length regularization: weight * mean (|J^T y| - a)^2, with J the derivative of images in latents.

    y is noise, N(0, 1), over the square root of the number of pixels, and ``a`` the running average of the lengths. A
    call in training renews ``a`` before it compares with it, from the samples of all ranks.

        penalty = PathLengthPenalty()
        latents = mapping(z)  # or a leaf that requires a gradient
        with fastgan.twice_differentiable():
            images = synthesis(latents)
        loss = softplus(-discriminator(images)).mean() + penalty(images, latents)

    Args:
        weight: factor.
        decay: of the average: ``a`` moves by this part of the way to the batch's mean length.
        process_group: the ranks whose lengths are averaged; None: the default group, if there is one. Each rank must
            call the module as often.

    Shape: images (N, C, ...), latents (N, D), or (N, L, D), of which the squared length is the mean over L of the sums
    over D. The result is (), float32 or better.

    Buffer: ``average`` (), ``a``, which starts at 0 and is in the state_dict.

    Raises:
        ValueError: latents of another shape, that require no gradient, or that the images were not made from.
        RuntimeError: gradients are off.

    Differentiable once in the generator's parameters, and in the latents. Source: Karras et al., StyleGAN2 (2020).
    """

    average: Tensor

    def __init__(self, weight: float = 2.0, decay: float = 0.01, *, process_group: Group | None = None) -> None:
        super().__init__()
        if not 0 <= decay <= 1:
            raise ValueError(f"decay must be between 0 and 1, got {decay}")
        self.weight, self.decay, self.process_group = weight, decay, process_group
        self.register_buffer("average", torch.zeros(()))

    @untraced
    def forward(self, images: Tensor, latents: Tensor) -> Tensor:
        _check(images, latents)
        noise = torch.randn_like(images) / prod(images.shape[2:]) ** 0.5
        lengths = path_lengths(images, latents, noise)  # (N,)
        if self.training:
            self._renew(lengths.detach().mean())
        return self.weight * (lengths - self.average.detach().to(lengths.dtype, copy=True)).square().mean()

    @torch.no_grad()
    def _renew(self, mean: Tensor) -> None:
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(mean, group=self.process_group)
            mean = mean / distributed.get_world_size(self.process_group)
        self.average.lerp_(mean.to(self.average), self.decay)

    def extra_repr(self) -> str:
        return f"weight={self.weight}, decay={self.decay}"


def _check(images: Tensor, latents: Tensor) -> None:
    if not torch.is_grad_enabled():
        raise RuntimeError("a path length needs gradients: call it outside torch.no_grad() and inference_mode()")
    if images.ndim < 2 or latents.ndim not in (2, 3) or len(latents) != len(images):
        raise ValueError(
            "images must be (N, C, ...) and latents (N, D) or (N, L, D), got shapes "
            f"{tuple(images.shape)} and {tuple(latents.shape)}"
        )
    for name, tensor in (("latents", latents), ("images", images)):
        if not tensor.requires_grad:
            raise ValueError(f"{name} must require a gradient: call latents.requires_grad_() before the generator")
