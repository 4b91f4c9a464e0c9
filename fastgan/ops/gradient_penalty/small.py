"""Discriminators whose double backward PyTorch has done before the Python that would save work in it has run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from math import prod
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fastgan import backends

_LEAST = 2**25  # multiplications in a forward, from which saving a third of a penalty's is worth its overhead

REASON = "the discriminator and its inputs are so small that PyTorch's own double backward is the faster"

_any_size: ContextVar[bool] = ContextVar("fastgan_any_size", default=False)


@contextmanager
def at_any_size() -> Iterator[None]:
    """Inside, in this thread, no discriminator is small: for who compares fastgan's double backward with PyTorch's."""
    token = _any_size.set(True)
    try:
        yield
    finally:
        _any_size.reset(token)


def is_small(discriminator: Any, inputs: Tensor) -> bool:
    """Whether PyTorch's own functions are the better ones on a CPU, and nothing was said about others."""
    if not (inputs.is_cpu and isinstance(discriminator, nn.Module)):
        return False
    if _any_size.get() or backends.is_forced() or backends.in_transform():
        return False
    return takes_less(discriminator, inputs, _LEAST)


def takes_less(module: nn.Module, inputs: Tensor, multiplications: int) -> bool:
    """Whether a forward surely takes less than so many.

    None is run for it: each parameter counts as used once at each position of the images.
    """
    left = multiplications // max(1, len(inputs) * prod(inputs.shape[2:]))
    counted = False  # a module without parameters hides them: a function that it calls has them
    for parameter in module.parameters():
        if is_lazy(parameter):
            return False
        counted = True
        left -= parameter.numel()
        if left < 0:
            return False
    return counted
