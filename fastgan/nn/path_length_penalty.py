"""StyleGAN2's path length regularization, as a module that holds the average length."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor, distributed, nn

from fastgan.ops.gradient_penalty.path_length import path_lengths
from fastgan.ops.minibatch_discrimination.ranks import Group
from fastgan.ops.regions import traceable


class PathLengthPenalty(nn.Module):
    """Path length regularization: weight * mean (|J^T y| - a)^2, where J is the derivative of images by latents.

    y is noise, N(0, 1) divided by the square root of the number of pixels. ``a`` is the moving average of the lengths
    on all ranks. In training, each call updates ``a`` before it computes the penalty.

    ```python
    import torch
    from torch import nn

    import fastgan
    from fastgan.nn import PathLengthPenalty

    generator = nn.Sequential(
        nn.Unflatten(1, (8, 1, 1)), nn.ConvTranspose2d(8, 3, 4), nn.Tanh()
    )
    penalty = PathLengthPenalty()
    latents = torch.randn(4, 8, requires_grad=True)  # or the output of a mapping network
    with fastgan.twice_differentiable():
        images = generator(latents)
    penalty(images, latents).backward()
    ```

    Args:
        weight: factor of the penalty.
        decay: the step of the moving average: ``a += decay * (mean length of the batch - a)``.
        process_group: the ranks over which lengths are averaged. None: the default group, if there is one. All ranks
            must call the module equally often.

    Shape: images (N, C, ...), latents (N, D) or (N, L, D). For (N, L, D), the squared length is the sum over D and the
    mean over L. The result has shape () and is float32 or float64.

    Buffer: ``average`` (), the moving average ``a``. It starts at 0 and is in the state_dict.

    Raises:
        TypeError: the images or the latents are not one tensor.
        ValueError: the latents have another shape or require no gradient, or the images do not depend on them.
        RuntimeError: gradients are disabled.

    Order of derivative: one, with respect to the parameters of the generator and the latents.

    Source: Karras et al., StyleGAN2 (2020).
    """

    average: Tensor

    def __init__(self, weight: float = 2.0, decay: float = 0.01, *, process_group: Group | None = None) -> None:
        super().__init__()
        if not 0 <= decay <= 1:
            raise ValueError(f"decay must be between 0 and 1, got {decay}")
        self.weight, self.decay, self.process_group = weight, decay, process_group
        self.register_buffer("average", torch.zeros(()))

    @traceable
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
    if not isinstance(images, Tensor) or not isinstance(latents, Tensor):
        raise TypeError(
            "images must be one tensor (N, C, ...) and latents one tensor (N, D) or (N, L, D), got "
            f"{type(images).__name__} and {type(latents).__name__}: stack the latents of L layers along dimension 1"
        )
    if images.ndim < 2 or latents.ndim not in (2, 3) or len(latents) != len(images):
        raise ValueError(
            "images must be (N, C, ...) and latents (N, D) or (N, L, D), got shapes "
            f"{tuple(images.shape)} and {tuple(latents.shape)}"
        )
    for name, tensor in (("latents", latents), ("images", images)):
        if not tensor.requires_grad:
            raise ValueError(f"{name} must require a gradient: call latents.requires_grad_() before the generator")
