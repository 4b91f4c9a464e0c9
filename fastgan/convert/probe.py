"""Compare two modules on random inputs up to the second derivative, in float64, on copies."""

from __future__ import annotations

import copy
import math
import random
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

# Tolerance of a relative difference. It is above the rounding of float64, and of float32 for a module that always
# computes in float32. It is far below the difference to another definition.
TOLERANCE = 1e-5


def double(module: nn.Module) -> nn.Module:
    """Return a float64 copy on the CPU, whose state may be changed."""
    return copy.deepcopy(module).cpu().double()


def randn(*shape: int, seed: int = 0) -> Tensor:
    """Draw random numbers without the generator of the process."""
    return torch.randn(shape, dtype=torch.float64, device="cpu", generator=torch.Generator("cpu").manual_seed(seed))


@torch.no_grad()
def randomize(module: nn.Module) -> None:
    """Give all tensors random values, the same ones in each copy. A gain of one or a mask of ones would not show."""
    # `derivatives` draws numbers with the first seeds.
    for seed, tensor in enumerate((*module.parameters(), *module.buffers()), 100):
        if tensor.is_floating_point():
            tensor.copy_(randn(*tensor.shape, seed=seed))
        elif tensor.dtype == torch.bool:
            tensor.copy_(randn(*tensor.shape, seed=seed) > 0)


def derivatives(function: Callable[..., Tensor], *operands: Tensor) -> list[Tensor]:
    """Return the result, its gradients, and the gradients of a penalty on these gradients."""
    with torch.enable_grad():
        result = function(*operands)
        scale = randn(*result.shape).to(result)
        grads = torch.autograd.grad((result * scale).sum(), operands, create_graph=True)
        weighted = [(g * randn(*g.shape, seed=i).to(g)).square().sum() for i, g in enumerate(grads)]
        penalty = torch.stack(weighted).sum()
        second = torch.autograd.grad(penalty, operands, allow_unused=True) if penalty.requires_grad else ()
    return [result.detach(), *(g.detach() for g in grads), *(g for g in second if g is not None)]


def difference(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the largest error of a tensor relative to its norm, or infinity for other shapes or non-finite values."""
    if [a.shape for a in actual] != [e.shape for e in expected]:
        return math.inf
    errors = [_relative(a, e) for a, e in zip(actual, expected, strict=True)]
    return max(errors, default=0.0)


@torch.no_grad()
def _relative(actual: Tensor, expected: Tensor) -> float:
    scale = float(expected.double().norm())
    error = float((actual.double() - expected.double()).norm())
    if not math.isfinite(scale + error):
        return math.inf
    return error / scale if scale > 0 else error


def outcome(function: Callable[[], Any]) -> tuple[Any, str | None]:
    """Return the result and None, or None and the error message. A user's module may raise any error."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return function(), None
    except Exception as error:
        return None, f"{type(error).__name__}: {error}".partition("\n")[0]


@contextmanager
def preserved_rng() -> Iterator[None]:
    """Restore the random number generators on the CPU afterwards: a module that is tried may draw numbers."""
    numpy: Any = sys.modules.get("numpy")
    states = random.getstate(), numpy.random.get_state() if numpy else None
    try:
        with torch.random.fork_rng([]):
            yield
    finally:
        random.setstate(states[0])
        if numpy:
            numpy.random.set_state(states[1])
