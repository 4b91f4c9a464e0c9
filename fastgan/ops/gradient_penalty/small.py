"""Small discriminators, for which the Python overhead of fastgan exceeds the work that it saves.

A forward with fewer multiplications than a threshold (overhead.py) runs PyTorch's own functions. Its graph often allows
one pass (graph_pass.py). If the parameters of the modules show that it has fewer or more, nothing is counted.
Otherwise, the multiplications of each call are counted before the call runs: PyTorch's own functions run until the
threshold is passed, and fastgan's from that layer on. The decision depends only on the current forward and the device,
so a resumed run makes the same choices. A call of one known module is remembered together with everything that can
change its size: the number of modules, the mode and the shapes.
"""

from __future__ import annotations

import sys
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from enum import Enum, auto
from operator import attrgetter
from typing import Any
from weakref import WeakKeyDictionary, ref

from torch import Tensor, nn

from fastgan import backends
from fastgan.ops.gradient_penalty.called_modules import Call, called_modules, code_of
from fastgan.ops.gradient_penalty.graph_pass import pays_in_one_pass
from fastgan.ops.gradient_penalty.overhead import Threshold, threshold
from fastgan.ops.gradient_penalty.sharding import may_be_sharded
from fastgan.ops.gradient_penalty.size import bound, estimate
from fastgan.ops.twice_differentiable import NAMES_OF_LACKING, Rerouting
from fastgan.torch_private import in_transform

MOST_SHAPES = 256  # the number of calls that are remembered per module

_is_cpu, _is_cuda = attrgetter("is_cpu"), attrgetter("is_cuda")
REASON = "the discriminator and its inputs are so small that PyTorch's own double backward is faster"
_ON_GPU = (
    ", because its functions take less time on the host. To use fastgan's, compile the step with torch.compile, or run "
    "it as a CUDA graph with fastgan.graphed_step"
)

_any_size: ContextVar[bool] = ContextVar("fastgan_any_size", default=False)


@contextmanager
def at_any_size() -> Iterator[None]:
    """Use fastgan for discriminators of any size in this thread.

    Tests that compare it with PyTorch need this, and CUDA graphs, whose replay takes no time on the host.
    """
    token = _any_size.set(True)
    try:
        yield
    finally:
        _any_size.reset(token)


class Size(Enum):
    SMALL = auto()
    UNKNOWN = auto()  # count while the forward runs
    TOKENS = auto()  # large, unless its calls are for one token each
    LARGE = auto()

    def rerouting(self, inputs: Sequence[Tensor]) -> Rerouting:
        """Return the context in which the forward runs."""
        if self in (Size.SMALL, Size.LARGE):
            return Rerouting(None if self is Size.SMALL else 0)
        limit = threshold(inputs[0])
        return Rerouting(1 if self is Size.TOKENS else limit.least, limit.per_layer)


def reason(inputs: Sequence[Tensor]) -> str:
    """Return why a small discriminator is left to PyTorch, and what helps."""
    return REASON + _ON_GPU if inputs[0].is_cuda else REASON


_large: WeakKeyDictionary[nn.Module, dict[Hashable, Threshold]] = WeakKeyDictionary()  # calls, and what they reach


def size_of(discriminator: Any, inputs: Sequence[Tensor], call: Call | None = None) -> Size:
    """Classify the size of a discriminator without running it.

    Args:
        call: identifies a call of one known module. A large one is remembered, because the estimate takes 0.1 ms.
    """
    if not _depends_on_size(inputs):
        return Size.LARGE
    if call is None:
        return _classify(discriminator, inputs)
    known, limit = _large.setdefault(call.module, {}), threshold(inputs[0])
    if known.get(call.details) == limit:
        return Size.LARGE
    size = _classify(discriminator, inputs)
    if size is Size.LARGE:
        _put(known, call.details, limit)
    return size


def _classify(discriminator: Any, inputs: Sequence[Tensor]) -> Size:
    modules = called_modules(discriminator)
    if modules is None:
        return Size.UNKNOWN
    most = bound(modules, inputs)
    if most is None:
        return Size.UNKNOWN
    limit = threshold(inputs[0])
    if not most.reaches(limit):
        return Size.SMALL
    cost = estimate(modules, inputs)
    if not cost.reaches(limit):
        return Size.UNKNOWN
    return Size.TOKENS if cost.may_loop(limit) else Size.LARGE


def has_fewer_multiplications(module: nn.Module, inputs: Tensor, multiplications: int) -> bool:
    """Return whether the parameters show that a forward has fewer multiplications. This runs no forward."""
    most = bound([module], [inputs])
    return most is not None and most.multiplications < multiplications


# Calls that are small and that PyTorch can differentiate twice. The next such call is neither checked nor intercepted.
# The value tells whether to read its graph: the first graph allowed one pass, which may be faster with these weights.
_left_to_pytorch: WeakKeyDictionary[nn.Module, dict[Hashable, bool]] = WeakKeyDictionary()


def left_to_pytorch(call: Call | None) -> bool | None:
    """Return whether to read the graph of a call that equals an earlier one that was small and only ran PyTorch's
    functions. Return None if there was none.
    """
    if call is None:
        return None
    module, details = call
    remembered: Any = _left_to_pytorch
    known = remembered.data.get(ref(module))  # its method get costs two functions of Python
    read = None if known is None else known.get(details)
    if read is None or _any_size.get() or backends.is_forced() or in_transform():
        return None
    return None if "torch.distributed.tensor" in sys.modules and may_be_sharded() else read


def leave_to_pytorch(call: Call, samples: int, *, readable: bool) -> None:
    """Remember that equal calls are small and run PyTorch's own functions.

    Args:
        readable: its graph allowed one pass.
    """
    if not NAMES_OF_LACKING.isdisjoint(call.names()):
        return  # a later call may run them
    weights = [parameter for parameter in call.module.parameters() if parameter.ndim > 1]
    _put(_left_to_pytorch.setdefault(call.module, {}), call.details, readable and pays_in_one_pass(weights, samples))


def _put(known: dict[Hashable, Any], key: Hashable, value: Any) -> None:
    if len(known) == MOST_SHAPES:
        known.clear()
    known[key] = value


def forget(call: Call | None) -> None:
    """Remove the recorded calls of this module."""
    if call is not None:
        _left_to_pytorch.pop(call.module, None)


def _depends_on_size(inputs: Sequence[Tensor]) -> bool:
    if _any_size.get() or backends.is_forced() or in_transform():
        return False
    return all(map(_is_cpu, inputs)) or all(map(_is_cuda, inputs))


# Discriminators that counting showed to be small, with the shapes of their inputs. The next forward is counted again,
# but not traced for one pass.
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
    """Return an object that identifies the discriminator and outlives a function that is defined for one call."""
    modules = called_modules(discriminator)
    return modules[0] if modules else code_of(discriminator)


def _shapes(inputs: Sequence[Tensor]) -> tuple[Any, ...]:
    return tuple(tuple(x.shape) for x in inputs)
