"""How many multiplications a forward of some modules takes, told by their parameters and the shapes of the inputs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import inf, prod
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from fastgan.ops.work import CALL, NORMALIZED

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_POOLS = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
_POOLED = 16  # positions that are often left before all are summed
_BY_CHANNELS = nn.modules.batchnorm._NormBase
_NORMS = (_BY_CHANNELS, nn.GroupNorm, nn.LayerNorm)


def all_modules(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """These and all that they hold, each once, in the order of registration."""
    found: dict[nn.Module, None] = {}
    waiting = list(modules)
    waiting.reverse()
    while waiting:
        module = waiting.pop()
        if module not in found:
            found[module] = None
            children = module._modules
            if children:
                waiting += [child for child in reversed(children.values()) if child is not None]
    return list(found)


class Cost(NamedTuple):
    multiplications: int
    layers: int

    def beyond_calls(self) -> int:
        """What is left once so many of fastgan's functions have been called."""
        return self.multiplications - CALL * self.layers


def bound(modules: Sequence[nn.Module], inputs: Sequence[Tensor]) -> Cost | None:
    """No less than a forward takes.

    Each parameter counts as used once at each position of the inputs. These are the product of all sizes but that of
    the batch and the smallest. None: parameters are not known, or there are none, so that a function hides them.
    """
    weights = layers = fixed = 0
    for module in all_modules(modules):
        parameters = module._parameters
        if not parameters:  # a normalization without weights has Nones
            continue
        if isinstance(module, _NORMS):
            each, whole = _normalized(module)
            weights += NORMALIZED * each
            fixed += NORMALIZED * whole
            layers += 1
            continue
        for parameter in parameters.values():
            if parameter is not None:
                if isinstance(parameter, UninitializedParameter):
                    return None
                weights += parameter.numel()
                layers += parameter.ndim > 1
    if not layers:
        return None
    positions = max(map(_positions, inputs))
    return Cost(len(inputs[0]) * (positions * weights + fixed), layers)


def _positions(x: Tensor) -> int:
    sizes = x.shape[1:]
    return prod(sizes) // min(sizes) if len(sizes) > 1 else 1


def _normalized(module: nn.Module) -> tuple[int, int]:
    """The elements that this normalizes: of each position, and of a whole sample."""
    if isinstance(module, _BY_CHANNELS):
        return module.num_features, 0
    if isinstance(module, nn.GroupNorm):
        return module.num_channels, 0
    if isinstance(module, nn.LayerNorm):
        elements = prod(module.normalized_shape)
        return (elements, 0) if len(module.normalized_shape) == 1 else (0, elements)
    return 0, 0


def estimate(modules: Sequence[nn.Module], inputs: Sequence[Tensor]) -> Cost:
    """About what a forward takes.

    Layers are taken to run in the order of registration. Strides and poolings that are modules shrink an image on the
    way. A linear layer after convolutions says what of the image is left: where functions have shrunk it, too, they are
    taken to have done so step by step.
    """
    x = max(inputs, key=Tensor.numel)
    walk = _Walk(x)
    for module in all_modules(modules):
        walk.enter(module)
    return Cost(int(len(x) * walk.total()), walk.layers)


class _Walk:
    """Follows the number of positions in a sample."""

    def __init__(self, x: Tensor) -> None:
        self.sample = x.shape[1:]
        self.positions = float(prod(x.shape[2:]))
        self.layers = 0
        self.per_sample = 0.0
        self.convolved: list[tuple[float, int]] = []  # the positions, and what each costs
        self.channels = 0
        self.kernels = False  # of more than one position
        self.strides = False
        self.left: int | None = None  # elements of a sample after the convolutions

    def enter(self, module: nn.Module) -> None:
        if isinstance(module, _POOLS):
            self.positions /= _product(module.stride, len(self.sample) - 1)
            self.strides = True
        each, whole = _normalized(module)
        if each or whole:
            self.layers += 1
            self.per_sample += NORMALIZED * whole
            self.convolved.append((max(self.positions, 1.0), NORMALIZED * each))
            return
        for parameter in module._parameters.values():
            if parameter is not None and parameter.ndim > 1:
                self.layers += 1
                self._use(module, parameter)

    def _use(self, module: nn.Module, weight: Tensor) -> None:
        if weight.ndim > 2:
            if isinstance(module, _CONVS):
                self._begin(module.in_channels)
                self.positions /= prod(module.stride)
                self.strides |= prod(module.stride) > 1
            self.convolved.append((max(self.positions, 1.0), weight.numel()))
            self.channels = weight.shape[0]
            self.kernels |= prod(weight.shape[2:]) > 1
            if isinstance(module, _TRANSPOSED):
                self.positions *= prod(module.stride)
                self.channels = weight.shape[1]
        elif self.channels:
            if self.left is None:
                self.left = weight.shape[-1]
            self.per_sample += weight.numel()
        else:
            self.per_sample += self._tokens(weight) * weight.numel()

    def _begin(self, channels: int) -> None:
        """Of the first convolution: the channels need not be the input's first dimension, nor be there at all."""
        elements = prod(self.sample)
        if not self.channels and elements % channels == 0:
            self.positions = elements / channels

    def _tokens(self, weight: Tensor) -> int:
        """How often a sample passes a product, where nothing convolves it first."""
        return prod(self.sample[:-1]) if len(self.sample) > 1 and weight.shape[-1] < prod(self.sample) else 1

    def total(self) -> float:
        shrunk = 1.0
        if self.convolved and self.left is not None and self.left % self.channels == 0:
            left = self.left / self.channels
            if left == 1:  # a sum over all positions, of which there were more: all that modules' strides have left
                left = _POOLED if self.kernels and not self.strides else inf
            shrunk = min(1.0, left / self.convolved[-1][0])
        last = max(1, len(self.convolved) - 1)
        steps: float = sum(
            max(1.0, positions * shrunk ** (i / last)) * cost for i, (positions, cost) in enumerate(self.convolved)
        )
        return steps + self.per_sample


def _product(size: Any, dims: int) -> int:
    return prod(size) if isinstance(size, tuple) else int(size) ** max(1, dims)
