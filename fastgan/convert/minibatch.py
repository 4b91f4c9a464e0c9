"""Convert minibatch statistics layers from other codebases.

A layer is found by its name, or because it appends channels to its input that are constant over the positions. It is
replaced only if its values and its derivatives up to the second equal those of fastgan's layer on batches of several
sizes. A layer with other groups, another variance or another eps is not replaced.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fastgan import ops
from fastgan.convert.probe import TOLERANCE, derivatives, difference, double, outcome, preserved_rng, randn
from fastgan.convert.replace import Replacement, become, can_become, changed_attributes
from fastgan.nn import MinibatchDiscrimination, MinibatchStdDev

Outcome = tuple[str | None, str]

_STDDEV = re.compile(r"mini_?batch_?(std|stat|average)|batch_?std", re.IGNORECASE)
_GROUP_SIZE = ("group_size", "stddev_group", "mbstd_group_size", "group")
_NUM_CHANNELS = ("num_channels", "num_new_features", "stddev_feat", "mbstd_num_channels", "num_features")
_INLINE = ("stddev_group", "mbstd_group_size", "stddev_feat")
_EPS = (1e-8, 1e-6, 1e-10, 1e-7, 1e-5, 1e-12, 1e-4)


class _SingleInput(Replacement):
    def is_as_compared(self: Any, *args: Any, **kwargs: Any) -> bool:
        if len(args) != 1 or not isinstance(args[0], Tensor) or args[0].ndim != self._fastgan["ndim"]:
            return False
        return super().is_as_compared(*args, **kwargs)


class _Stddev(_SingleInput):
    def replacement(self: Any, x: Tensor) -> Tensor:
        return ops.minibatch_stddev(x, **self._fastgan["settings"])


class _Discrimination(_SingleInput):
    def replacement(self: Any, x: Tensor) -> Tensor:
        _, kernels, dim = self.T.shape
        activations = (x @ self.T.flatten(1)).view(-1, kernels, dim)  # (N, B, C)
        closeness = ops.minibatch_discrimination(activations, exclude_self=self._fastgan["exclude_self"])
        if self._fastgan["mean"]:
            closeness = closeness / (len(x) - 1)
        return torch.cat([x, closeness], 1)


def convert(module: nn.Module) -> Outcome | None:
    """Replace a minibatch statistics layer. Return None if the module is not such a layer."""
    if isinstance(module, MinibatchStdDev | MinibatchDiscrimination):
        return None, "already a fastgan layer"
    T = module._parameters.get("T")
    if T is not None and not is_lazy(T) and T.ndim == 3:
        convert_it: Callable[[], Outcome] = partial(_convert_discrimination, module, T)
    elif _STDDEV.search(type(module).__name__) or _appends_statistics(module):
        convert_it = partial(_convert_stddev, module)
    elif any(name in vars(module) for name in _INLINE) and not any(
        _STDDEV.search(type(part).__name__) for part in module.modules()
    ):
        return None, "its own forward computes a minibatch statistic; only whole layers are replaced"
    else:
        return None
    if not can_become(module, "forward"):
        return None, "its forward is overridden on the instance"
    with preserved_rng():
        return convert_it()


def _appends_statistics(module: nn.Module) -> bool:
    """Return whether a layer without tensors appends channels that are constant over the positions."""
    if module._modules or module._parameters or module._buffers or type(module).__module__.startswith("torch."):
        return False
    found, _ = outcome(lambda: inspect.signature(module.forward).bind(None))
    if found is None:
        return False
    x = randn(4, 6, 4, 4)
    with preserved_rng(), torch.no_grad():
        y, _ = outcome(lambda: double(module).train().forward(x.clone()))
    if not isinstance(y, Tensor) or y.dtype != x.dtype or y.ndim != 4 or y.shape[1] <= 6:
        return False
    if y[:, :6].shape != x.shape:
        return False
    return torch.equal(y[:, :6], x) and torch.equal(y[:, 6:], y[:, 6:, :1, :1].expand_as(y[:, 6:]))


def _convert_stddev(module: nn.Module) -> Outcome:
    if any(True for _ in (*module.parameters(), *module.buffers())):
        return None, "a minibatch statistics layer with its own parameters or buffers"
    group_sizes = [n for n in _declared(module, _GROUP_SIZE) if n is None or n > 0] or [4, None]
    channels = [n for n in _declared(module, _NUM_CHANNELS) if n] or [1]
    reason = "has no known settings"
    for group_size, num_channels in product(group_sizes, channels):
        eps, failure = outcome(partial(_eps_of, module, group_size, num_channels))
        if failure:
            reason = f"could not be tried: {failure}"
            continue
        if not eps > 0:
            reason = "has no eps inside the square root, so equal samples have no derivative"
            continue
        for remainder in ("error", "largest-divisor"):
            settings = dict(group_size=group_size, num_channels=num_channels, eps=eps, remainder=remainder)
            error, failure = outcome(partial(_stddev_difference, module, settings))
            if failure:
                reason = f"could not be compared: {failure}"
            elif error <= TOLERANCE:
                become(module, _Stddev, "forward", ndim=4, settings=settings)
                listed = ", ".join(f"{name}={value!r}" for name, value in settings.items())
                return "minibatch_stddev", f"agrees to {error:.0e} up to the second order: {listed}"
            else:
                reason = "computes another statistic (different groups, variance, eps or remainder)"
    return None, reason


def _declared(module: nn.Module, names: tuple[str, ...]) -> list[int | None]:
    values = [vars(module)[name] for name in names if name in vars(module)]
    return [value for value in values if value is None or isinstance(value, int)]


def _eps_of(module: nn.Module, group_size: int | None, num_channels: int) -> float:
    """Return the eps: the square of the statistic for equal samples."""
    channels = 3 * num_channels
    x = torch.ones(2 * (group_size or 4), channels, 4, 4, dtype=torch.float64, device="cpu")
    y = double(module).train().forward(x)
    if not torch.equal(y[:, :channels], x):
        raise ValueError("it does not append its statistics to its input")
    squared = float(y[:, channels:].square().max())
    return next((eps for eps in _EPS if abs(squared - eps) < 1e-4 * eps), squared)


def _stddev_difference(module: nn.Module, settings: dict[str, Any]) -> float:
    reference, fused = double(module), double(module)
    become(fused, _Stddev, "forward", ndim=4, settings=settings)
    size = settings["group_size"] or 4
    channels = 3 * settings["num_channels"]
    batches = [(2 * size, (4, 4)), (2 * size, (3, 5)), (3 * size, (4, 4)), (1, (4, 4))]
    batches += [(n, (4, 4)) for n in (size - 1, size + 1) if n > 1]
    errors = []
    for samples, positions in batches:
        # Values of usual size, and values so small that eps matters.
        for scale in (1.0, settings["eps"] ** 0.5):
            x = (scale * randn(samples, channels, *positions)).requires_grad_()

            def results(layer: nn.Module, x: Tensor = x) -> list[Tensor]:
                found: list[Tensor] = []
                for training in (True, False):
                    y = layer.train(training).forward(x)
                    found.append(y[:, :channels].detach())
                    found += derivatives(lambda x: layer.forward(x)[:, channels:], x)
                return found

            expected, failure = outcome(partial(results, reference))
            if failure is None:
                errors.append(difference(results(fused), expected))
            elif samples == 2 * size and positions == (4, 4):
                raise RuntimeError(failure)
    # The treatment of a remainder shows only for some batch sizes, so try them all, with usual and large values.
    # A layer may also compute another statistic for large images.
    shapes = [(samples, 4, 4) for samples in range(1, max(4 * size, 64) + 1)]
    shapes += [(2 * size, side, side) for side in (1, 8, 16, 32, 64, 128)] + [(2 * size, 5, 200)]
    for samples, height, width in shapes:
        x = randn(samples, channels, height, width) * (1.0 if samples % 3 else 1e3)
        expected, failure = outcome(partial(reference.forward, x))
        if failure is None:
            errors.append(difference([fused.forward(x)], [expected]))
    if changed := changed_attributes(reference, module):
        raise ValueError(f"its forward changes {', '.join(changed)}")
    return max(errors)


def _convert_discrimination(module: nn.Module, T: Tensor) -> Outcome:
    if len(list(module.parameters())) > 1 or any(True for _ in module.buffers()):
        return None, "minibatch discrimination with tensors other than T"
    features, _, dim = T.shape
    x, values = randn(7, features), randn(*T.shape, seed=1) / (features**0.5 * dim)

    def results(layer: Any) -> list[Tensor]:
        found: list[Tensor] = []
        for scale, training in product((1.0, 8.0), (True, False)):  # samples that are close, and distant ones
            layer.T.data = scale * values
            operands = x.clone().requires_grad_(), layer.T.requires_grad_()
            found.append(layer.train(training).forward(x)[:, :features].detach())
            found += derivatives(lambda x, _: layer.forward(x)[:, features:], *operands)
        return found

    reference, failure = outcome(lambda: double(module))
    if failure is None:
        expected, failure = outcome(lambda: results(reference))
    if failure:
        return None, f"could not be tried: {failure}"
    if changed := changed_attributes(reference, module):
        return None, f"its forward changes {', '.join(changed)}"
    least = math.inf
    for exclude_self, mean in product((True, False), (False, True)):
        fused = double(module)
        become(fused, _Discrimination, "forward", ndim=2, exclude_self=exclude_self, mean=mean)
        error = difference(results(fused), expected)
        if error <= TOLERANCE:
            become(module, _Discrimination, "forward", ndim=2, exclude_self=exclude_self, mean=mean)
            settings = f"exclude_self={exclude_self}" + (", divided by N - 1" if mean else "")
            return "minibatch_discrimination", f"agrees to {error:.0e} up to the second order: {settings}"
        least = min(least, error)
    return None, f"computes another function of T; differs from minibatch_discrimination by {least:.1e}"
