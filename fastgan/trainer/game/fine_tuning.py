"""Starting from the weights of another run: tensors that fit are copied, others are listed. Frozen layers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


@torch.no_grad()
def copy_weights(module: nn.Module, weights: Mapping[str, Tensor]) -> list[str]:
    """Copy tensors that have the same name and shape, and return one line for each of the others."""
    own = module.state_dict()
    problems = []
    for name, tensor in own.items():
        other = weights.get(name)
        if other is None:
            problems.append(f"{name} {tuple(tensor.shape)}: new")
        elif other.shape != tensor.shape:
            problems.append(f"{name}: {tuple(other.shape)} became {tuple(tensor.shape)}")
        else:
            tensor.copy_(other)
    unused = [name for name in weights if name not in own]
    return problems + [f"{name} {tuple(weights[name].shape)}: not used" for name in unused]


def first_layers(discriminator: nn.Module, count: int) -> list[nn.Parameter]:
    """Return the parameters of the first `count` layers of a discriminator, those nearest to the image.

    Mo et al. 2020, Freeze the Discriminator.

    Raises:
        ValueError: there are fewer.
    """
    layers = [
        layer for layer in discriminator.get_submodule("features").children() if any(True for _ in layer.parameters())
    ]
    if count > len(layers):
        raise ValueError(f"freeze_d must be at most {len(layers)}, the discriminator's layers, got {count}")
    return [parameter for layer in layers[:count] for parameter in layer.parameters()]
