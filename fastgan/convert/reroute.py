"""Reroute calls in a converted model's forward to fastgan's ops.

In a large forward of a convolutional model, these are convolutions, activations, pooling and norms. Where an input
requires a gradient, so that a penalty may follow, they are the functions that PyTorch cannot differentiate twice, such
as attention, in any model.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from fastgan import backends
from fastgan.convert.replace import Replacement, become, can_become, is_converted, made_from
from fastgan.ops.gradient_penalty.small import MOST_SHAPES, has_fewer_multiplications
from fastgan.ops.twice_differentiable import Rerouting, is_rerouting, twice_differentiable

_LEAST = (
    2**36
)  # multiplications in a forward, as bounded by `has_fewer_multiplications`; above it, a step on a CPU gets faster


class Rerouted(Replacement):
    def runs_original(self: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        if kwargs or len(args) != 1 or not isinstance(x := args[0], Tensor):
            return False
        key = self.training, x.shape, x.dtype, x.is_cpu, x.requires_grad
        return key in self._fastgan.get("unchanged", ())

    def is_as_compared(self: Any, *args: Any, **kwargs: Any) -> bool:
        if not torch.is_grad_enabled() or backends.is_forced() or backends.in_transform() or is_rerouting():
            return False
        values = *args, *kwargs.values()
        if _is_large(self, values) or _may_lack_derivatives(self, values):
            return True
        if len(values) == len(args) == 1 and isinstance(x := args[0], Tensor):
            _remember(self, "unchanged", (self.training, x.shape, x.dtype, x.is_cpu, x.requires_grad), True)
        return False

    def replacement(self: Any, *args: Any, **kwargs: Any) -> Any:
        base, _, _ = made_from(self)
        values = *args, *kwargs.values()
        if _is_large(self, values):
            with twice_differentiable():
                return base.forward(self, *args, **kwargs)
        with Rerouting(None) as rerouting:
            returned = base.forward(self, *args, **kwargs)
        _remember(self, "may_lack", _form(self, values), not rerouting.only_pytorch_ran)
        return returned


def _is_large(module: Any, values: tuple[Any, ...]) -> bool:
    images = next(_images(values), None)
    if images is None or not images.is_cpu or not module._fastgan["is_convolutional"]:
        return False
    large: bool | None = module._fastgan.get("is_large", {}).get(images.shape)
    if large is None:
        large = not has_fewer_multiplications(module, images, _LEAST)
        _remember(module, "is_large", images.shape, large)
    return large


def _may_lack_derivatives(module: Any, values: tuple[Any, ...]) -> bool:
    """Return whether a gradient through a function without a second derivative may be differentiated.

    A forward that called no such function is remembered. The next forward of this form runs without a mode.
    """
    if not any(isinstance(value, Tensor) and value.requires_grad for value in values):
        return False
    lacks: bool = module._fastgan.get("may_lack", {}).get(_form(module, values), module._fastgan["has_own_code"])
    return lacks


def _form(module: Any, values: tuple[Any, ...]) -> tuple[Any, ...]:
    return module.training, *(value.shape for value in values if isinstance(value, Tensor))


def _remember(module: Any, name: str, key: Any, value: bool) -> None:
    known: dict[Any, bool] = module._fastgan.setdefault(name, {})
    if len(known) == MOST_SHAPES:
        known.clear()
    known[key] = value


def _images(values: tuple[Any, ...]) -> Iterator[Tensor]:
    return (value for value in values if isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 2)


def convert(model: nn.Module) -> str | None:
    """Reroute the model's own forward if it has one. Return a description of the rerouted calls, or None."""
    own = type(model).__module__
    if is_converted(model) or parametrize.is_parametrized(model):
        return None
    if own.startswith("torch.") and own != nn.Sequential.__module__:
        return None  # a wrapper or a layer
    if not model._modules or not can_become(model, "forward"):
        return None
    is_convolutional = any(is_lazy(parameter) or parameter.ndim > 2 for parameter in model.parameters())
    has_own_code = any(_has_own_code(module) for module in model.modules())
    if not is_convolutional and not has_own_code:
        return None
    become(model, Rerouted, "forward", is_convolutional=is_convolutional, has_own_code=has_own_code)
    if is_convolutional:
        return "calls in its forward are rerouted on a CPU, for large batches"
    return "functions without a second derivative are rerouted if an input requires a gradient"


_LACKING = (
    *(nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer, nn.Transformer),
    *(nn.Hardsigmoid, nn.PairwiseDistance, nn.EmbeddingBag, nn.RNNBase),
)


def _has_own_code(module: nn.Module) -> bool:
    """Return whether the module may call a function that PyTorch cannot differentiate twice."""
    return not type(module).__module__.startswith("torch.") or isinstance(module, _LACKING)
