"""Reroute the convolutions, activations, pooling and norms in a converted model's forward to fastgan's ops."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from fastgan import backends
from fastgan.convert.replace import Replacement, become, can_become, is_converted, made_from
from fastgan.ops.gradient_penalty.small import MOST_SHAPES, takes_less
from fastgan.ops.twice_differentiable import is_rerouting, twice_differentiable

_LEAST = 2**36  # multiplications in a forward, as bounded by `takes_less`; above it, a step on a CPU gets faster


class Rerouted(Replacement):
    def is_as_compared(self: Any, *args: Any, **kwargs: Any) -> bool:
        if not torch.is_grad_enabled() or backends.is_forced() or backends.in_transform() or is_rerouting():
            return False
        images = next(_images((*args, *kwargs.values())), None)
        return images is not None and images.is_cpu and _is_large(self, images)

    def replacement(self: Any, *args: Any, **kwargs: Any) -> Any:
        base, _, _ = made_from(self)
        with twice_differentiable():
            return base.forward(self, *args, **kwargs)


def _is_large(module: Any, images: Tensor) -> bool:
    known: dict[torch.Size, bool] = module._fastgan.setdefault("is_large", {})
    large = known.get(images.shape)
    if large is None:
        if len(known) == MOST_SHAPES:
            known.clear()
        large = known[images.shape] = not takes_less(module, images, _LEAST)
    return large


def _images(values: tuple[Any, ...]) -> Iterator[Tensor]:
    return (value for value in values if isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 2)


def convert(model: nn.Module) -> bool:
    """Reroute the model's own forward if it has one. Return whether it is rerouted from now on."""
    own = type(model).__module__
    if is_converted(model) or parametrize.is_parametrized(model):
        return False
    if own.startswith("torch.") and own != nn.Sequential.__module__:
        return False  # a wrapper or a layer
    if not model._modules or not can_become(model, "forward"):
        return False
    if not any(is_lazy(parameter) or parameter.ndim > 2 for parameter in model.parameters()):
        return False
    become(model, Rerouted, "forward")
    return True
