"""Estimate the multiplications in a forward from the parameters of the modules and the shapes of the inputs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import inf, prod
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from fastgan.ops.gradient_penalty.overhead import Threshold
from fastgan.ops.work import NORMALIZED

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_POOLS = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
_POOLED = 16  # the usual number of positions before global pooling
_BY_CHANNELS = nn.modules.batchnorm._NormBase
_NORMS = (_BY_CHANNELS, nn.GroupNorm, nn.LayerNorm)


def all_modules(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Return the modules and all their descendants, each once, in the order of registration."""
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
    of_token: int = 0  # of the largest layer that runs on each token, for one token

    def reaches(self, threshold: Threshold) -> bool:
        return self.multiplications >= threshold.least + threshold.per_layer * self.layers

    def may_loop(self, threshold: Threshold) -> bool:
        """Return whether calls for one token each, as in a recurrent network, would be too small."""
        return 0 < self.of_token < threshold.per_layer


def bound(modules: Sequence[nn.Module], inputs: Sequence[Tensor]) -> Cost | None:
    """Return an upper bound of the cost of a forward.

    Each parameter counts once per position of the inputs. The number of positions is the product of all sizes except
    that of the batch and the smallest one. Return None if a parameter is uninitialized or there is no layer: then the
    discriminator may compute with tensors that are not parameters of the modules.
    """
    weights = layers = fixed = 0
    for module in all_modules(modules):
        parameters = module._parameters
        if not parameters:  # a normalization without weights has entries that are None
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
    """Return the number of elements that the module normalizes per position, and per sample."""
    if isinstance(module, _BY_CHANNELS):
        return module.num_features, 0
    if isinstance(module, nn.GroupNorm):
        return module.num_channels, 0
    if isinstance(module, nn.LayerNorm):
        elements = prod(module.normalized_shape)
        return (elements, 0) if len(module.normalized_shape) == 1 else (0, elements)
    return 0, 0


def estimate(modules: Sequence[nn.Module], inputs: Sequence[Tensor]) -> Cost:
    """Estimate the cost of a forward.

    The estimate assumes that layers run in the order of registration. Strides and pooling modules shrink the image. The
    first linear layer after the convolutions, or a large kernel without padding, shows the final size. If that is
    smaller than the modules explain, the estimate assumes that functions have shrunk the image gradually.
    """
    x = max(inputs, key=Tensor.numel)
    found = all_modules(modules)
    walk = _Walk([x.shape[1:], *(other.shape[1:] for other in inputs if other is not x)])
    walk.first = next((m.in_channels for m in found if isinstance(m, _CONVS) and m.in_channels in x.shape[1:]), None)
    for module in found:
        walk.enter(module)
    return Cost(int(len(x) * walk.total()), walk.layers, len(x) * walk.of_token)


class _Walk:
    """Track the number of positions in a sample from layer to layer."""

    def __init__(self, samples: Sequence[Sequence[int]]) -> None:
        self.samples = samples  # the shape of a sample of each input, the largest first
        self.sample = samples[0]
        self.positions = float(prod(self.sample[1:]))
        self.first: int | None = None  # the channels of the convolution that reads the input
        self.of_token = 0
        self.flat = False  # whether a linear layer has read the whole sample
        self.features: tuple[int, int] | None = None  # of the last linear layer: how often it runs, and its outputs
        self.layers = 0
        self.per_sample = 0.0
        self.convolved: list[tuple[float, int]] = []  # the number of positions, and the cost of each
        self.channels = 0
        self.kernels = False  # whether a kernel covers more than one position
        self.strides = False
        self.left: int | None = None  # the elements of a sample after the convolutions

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
        if weight.ndim > 2 and self.channels and (self.left is not None or _covers_its_input(module)):
            self.left = self.left or weight[0].numel()
            self.per_sample += weight.numel()
        elif weight.ndim > 2:
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
            tokens = self._tokens(weight)
            self.per_sample += tokens * weight.numel()
            if tokens > 1:
                self.of_token = max(self.of_token, weight.numel())

    def _begin(self, channels: int) -> None:
        """Set the positions at the first convolution. The input may lack a channel dimension or have it elsewhere."""
        elements = prod(self.sample)
        channels = self.first or channels
        if not self.channels and elements % channels == 0:
            self.positions = elements / channels

    def _tokens(self, weight: Tensor) -> int:
        """Return how often a matrix product is applied per sample, if no convolution comes first."""
        outputs, inputs = weight.shape[0], weight.shape[-1]
        fitting = [prod(sample[:-1]) for sample in self.samples if len(sample) > 1 and sample[-1] == inputs]
        tokens = min(fitting, default=prod(self.sample[:-1]) if len(self.sample) > 1 else 1)
        if self.features is not None and not fitting:
            tokens = min(tokens, self.features[0])
            self.flat |= inputs == self.features[0] * self.features[1] and tokens > 1
        self.flat |= inputs >= prod(self.sample)
        tokens = 1 if self.flat else tokens
        self.features = tokens, outputs
        return tokens

    def total(self) -> float:
        shrunk = 1.0
        if self.convolved and self.left is not None and self.left % self.channels == 0:
            left = self.left / self.channels
            if left == 1:  # a sum over all positions: take the number that the strides of the modules leave
                left = _POOLED if self.kernels and not self.strides else inf
            shrunk = min(1.0, left / self.convolved[-1][0])
        last = max(1, len(self.convolved) - 1)
        steps: float = sum(
            max(1.0, positions * shrunk ** (i / last)) * cost for i, (positions, cost) in enumerate(self.convolved)
        )
        return steps + self.per_sample


def _covers_its_input(module: nn.Module) -> bool:
    """Return whether a convolution has the form of those that take a whole map to one position."""
    if not isinstance(module, _CONVS):
        return False
    shifts = prod(module.stride) > 1 or (module.padding != "valid" and any(module.padding))
    return not shifts and min(module.kernel_size) > 3


def _product(size: Any, dims: int) -> int:
    return prod(size) if isinstance(size, tuple) else int(size) ** max(1, dims)
