"""Discriminators whose double backward PyTorch has done before the Python that would save work in it has run.

On a CPU, a forward of fewer multiplications than a threshold is left to PyTorch. Where the modules behind the
discriminator tell that it surely takes fewer, or that it takes more, nothing is counted. Elsewhere each call of a
forward is counted before it runs: PyTorch's own functions run until the threshold is passed, and fastgan's from that
layer on. What is decided depends on this forward alone, so that a resumed run goes the same way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from enum import Enum, auto
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from fastgan import backends
from fastgan.ops.gradient_penalty.behind import behind, code_of
from fastgan.ops.gradient_penalty.size import bound, estimate

LEAST = 2**25  # multiplications in a forward, from which saving a third of a penalty's is worth its overhead

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


class Size(Enum):
    SMALL = auto()
    UNKNOWN = auto()  # count while the forward runs
    LARGE = auto()


def size_of(discriminator: Any, inputs: Sequence[Tensor]) -> Size:
    """What is known of the size before a forward runs."""
    if not all(x.is_cpu for x in inputs) or _any_size.get() or backends.is_forced() or backends.in_transform():
        return Size.LARGE
    modules = behind(discriminator)
    if modules is None:
        return Size.UNKNOWN
    most = bound(modules, inputs)
    if most is None:
        return Size.UNKNOWN
    if most.beyond_calls() < LEAST:
        return Size.SMALL
    return Size.LARGE if estimate(modules, inputs).beyond_calls() >= LEAST else Size.UNKNOWN


def takes_less(module: nn.Module, inputs: Tensor, multiplications: int) -> bool:
    """Whether a forward surely takes less than so many. None is run for it."""
    most = bound([module], [inputs])
    return most is not None and most.multiplications < multiplications


# Who has been found to be small by counting a forward, for which shapes. The next forward is counted again; all that it
# is spared is what watches for one pass.
_counted: WeakKeyDictionary[Any, set[Any]] = WeakKeyDictionary()


def was_small(discriminator: Any, inputs: Sequence[Tensor]) -> bool:
    owner = owner_of(discriminator)
    return owner is not None and _shapes(inputs) in _counted.get(owner, ())


def remember(discriminator: Any, inputs: Sequence[Tensor], small: bool) -> None:
    owner = owner_of(discriminator)
    if owner is not None:
        found = _counted.setdefault(owner, set())
        (found.add if small else found.discard)(_shapes(inputs))


def owner_of(discriminator: Any) -> Any:
    """What outlives a function that is made for one call."""
    modules = behind(discriminator)
    return modules[0] if modules else code_of(discriminator)


def _shapes(inputs: Sequence[Tensor]) -> tuple[Any, ...]:
    return tuple(tuple(x.shape) for x in inputs)
