"""Discriminators whose double backward PyTorch has done before the Python that would save work in it has run.

On a CPU, a forward of fewer multiplications than a threshold is left to PyTorch. Where the modules behind the
discriminator tell that it surely takes fewer, or that it takes more, nothing is counted. Elsewhere each call of a
forward is counted before it runs: PyTorch's own functions run until the threshold is passed, and fastgan's from that
layer on. What is decided depends on this forward alone, so that a resumed run goes the same way. A call that runs one
known module is remembered by everything that can decide its size: the module's parts, its mode, the shapes.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from enum import Enum, auto
from operator import attrgetter
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from fastgan import backends
from fastgan.ops.gradient_penalty.behind import Call, behind, code_of
from fastgan.ops.gradient_penalty.sharding import may_be_sharded
from fastgan.ops.gradient_penalty.size import bound, estimate
from fastgan.torch_private import in_transform

MOST_SHAPES = 256  # that are remembered of a module
LEAST = 2**25  # multiplications in a forward, from which saving a third of a penalty's is worth its overhead

_is_cpu = attrgetter("is_cpu")
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

    @property
    def after(self) -> int | None:
        """The multiplications after which fastgan's functions run; None: never."""
        return {Size.SMALL: None, Size.UNKNOWN: LEAST, Size.LARGE: 0}[self]


def size_of(discriminator: Any, inputs: Sequence[Tensor]) -> Size:
    """What is known of the size before a forward runs."""
    if not _depends_on_size(inputs):
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


# Calls that are left to PyTorch: small, and PyTorch has every second derivative. Nothing intercepts the next such call.
_left_to_pytorch: WeakKeyDictionary[nn.Module, set[Hashable]] = WeakKeyDictionary()


def is_left_to_pytorch(call: Call | None, inputs: Sequence[Tensor]) -> bool:
    """Return whether an earlier call of this kind has shown that PyTorch does it faster, with every derivative."""
    if call is None or call.details not in _left_to_pytorch.get(call.module, ()):
        return False
    return _depends_on_size(inputs) and not may_be_sharded()


def leave_to_pytorch(call: Call) -> None:
    known = _left_to_pytorch.setdefault(call.module, set())
    if len(known) == MOST_SHAPES:
        known.clear()
    known.add(call.details)


def forget(call: Call | None) -> None:
    """Look at the next call again, as if it were the first."""
    if call is not None:
        _left_to_pytorch.pop(call.module, None)


def _depends_on_size(inputs: Sequence[Tensor]) -> bool:
    if _any_size.get() or backends.is_forced() or in_transform():
        return False
    return all(map(_is_cpu, inputs))


# Functions around unknown modules that were found to be small by counting a forward, and for which shapes. The next
# forward is counted again, but not watched for one pass.
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
