"""Gradient normalization of a discriminator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastgan.ops.gradient_penalty.gradients_of_logits import gradients_of_logits
from fastgan.ops.gradient_penalty.inputs import Inputs
from fastgan.ops.gradient_penalty.norms import norms
from fastgan.ops.regions import traceable


class GradientNormalized(nn.Module):
    """Gradient normalization: f / (|grad f| + |f|). Where f is piecewise affine, its slope is at most 1.

    ```python
    import torch
    from torch import nn

    from fastgan.nn import GradientNormalized

    network = nn.Sequential(nn.Linear(8, 16), nn.LeakyReLU(0.2), nn.Linear(16, 1))
    discriminator = GradientNormalized(network)
    real, fake = torch.randn(2, 4, 8)
    (discriminator(fake) - discriminator(real)).mean().backward()
    ```

    |grad f| is the norm of the gradient of a sample's logits, summed, with respect to its input, in float32 or float64.
    If there are several logits per sample, each is divided by the sum of |grad f| and its own absolute value, as in the
    authors' code. Where f and its gradient are both zero, the result is zero.

    Args:
        discriminator: returns one tensor of logits, (N, ...).

    Shape: the output has the shape of the discriminator's. ``forward`` takes the discriminator's inputs, (N, *S) or a
    tuple, list or dict of these, and its further arguments.

    Raises:
        TypeError, ValueError: as in ``fastgan.gradient_penalty``, and if the discriminator returns several tensors.

    Order of derivative: one, with respect to parameters and inputs. The result costs a forward and a backward of the
    discriminator, even if gradients are disabled.

    Source: Wu et al., Gradient Normalization for Generative Adversarial Networks (2021).
    """

    def __init__(self, discriminator: nn.Module) -> None:
        super().__init__()
        self.discriminator = discriminator

    @traceable
    def forward(self, inputs: Inputs, *args: Any, **kwargs: Any) -> Tensor:
        differentiable = torch.is_grad_enabled()
        with torch.inference_mode(False), torch.enable_grad():
            logits, grads = gradients_of_logits(self.discriminator, inputs, args, kwargs, create_graph=differentiable)
            size = norms(grads, None, squared=False)  # (N,)
            f = logits.to(size.dtype)
            total = size.view(-1, *[1] * (f.ndim - 1)) + f.abs()
            normalized = (f / total.masked_fill(total == 0, 1)).to(logits.dtype)
        return normalized if differentiable else normalized.detach()
