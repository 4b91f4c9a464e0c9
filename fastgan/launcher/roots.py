"""Root modules, whose calls are not inside the call of another module, and the hooks that observe these calls.

While there is something to learn, global hooks mark the output of every root module. If no input of the root requires
a gradient, they also mark the outermost calls inside it that have such an input: a wrapper that augments images may
make the input of its inner module require a gradient. Afterwards only the penalized modules have hooks. Pickles and
copies leave these hooks out, and no class is changed.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from itertools import count
from threading import local
from types import SimpleNamespace
from typing import Any, NamedTuple
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from fastgan.launcher.sites import Site, place, site
from fastgan.nn.utils.fuse_spectral_norm import _Fused
from fastgan.torch_private import remove_hook

OUTPUT = "fastgan: the output of a root module"
INNER = "fastgan: the output of a module inside, whose input requires a gradient"


@dataclass
class Call:
    """One call of a root module."""

    module: ReferenceType[nn.Module]
    site: Site
    place: str
    takes_gradient: bool  # whether an input requires a gradient
    began: int = field(default=0, compare=False)  # numbers of all calls and returns, in their order
    ended: int = field(default=0, compare=False)

    def is_inside(self, other: Call) -> bool:
        return other.began < self.began and self.ended < other.ended


def leaves(given: Any) -> list[Any]:
    """Return the values in containers, and the tensors in dataclasses and namespaces among them."""
    found = tree_leaves(given)
    for value in tuple(found):
        if isinstance(value, SimpleNamespace) or (is_dataclass(value) and not isinstance(value, type)):
            names = [entry.name for entry in fields(value)] if is_dataclass(value) else vars(value)
            inside = tree_leaves([getattr(value, name, None) for name in names])
            found += [tensor for tensor in inside if isinstance(tensor, Tensor)]
    return found


def requires_gradient(given: Any) -> bool:
    return any(isinstance(value, Tensor) and value.requires_grad for value in leaves(given))


def _metadata(output: Any) -> Iterator[Any]:
    for tensor in (output,) if isinstance(output, Tensor) else leaves(output):
        if isinstance(tensor, Tensor) and tensor.grad_fn is not None:
            yield tensor.grad_fn.metadata


def mark(output: Any, key: str, value: object) -> None:
    for metadata in _metadata(output):
        metadata[key] = value


def mark_output(output: Any, call: Call) -> None:
    """Mark the output of a call, unless the global hooks have done it. They also know what is inside of it."""
    for metadata in _metadata(output):
        known = metadata.get(OUTPUT)
        if known is None or known.module() is not call.module():
            metadata[OUTPUT] = call


class _Running(NamedTuple):
    """A call of a module that has not returned."""

    module: nn.Module
    takes_gradient: bool  # in a positional argument: PyTorch does not pass the others to a hook before a call
    is_inside: bool  # of a call that takes a gradient
    began: int


class GlobalHooks:
    """Mark the outputs of all root modules, in every thread.

    Args:
        returned: is called with each root module, its arguments and its keyword arguments when its call has returned.
    """

    def __init__(self, returned: Callable[[nn.Module, Any, Any], None] | None = None) -> None:
        self._returned = returned
        self._handles: list[RemovableHandle] = []
        self._depth = local()
        self._numbers = count(1)

    @property
    def are_on(self) -> bool:
        return bool(self._handles)

    def turn_on(self) -> None:
        if not self._handles:
            self._depth = local()
            self._handles = [
                torch_module.register_module_forward_pre_hook(self._before),
                torch_module.register_module_forward_hook(self._after, with_kwargs=True, always_call=True),
            ]

    def turn_off(self) -> None:
        while self._handles:
            remove_hook(self._handles.pop())

    def _before(self, module: nn.Module, args: Any) -> None:
        if not torch.compiler.is_compiling():
            stack = self._stack()
            is_inside = bool(stack) and (stack[-1].takes_gradient or stack[-1].is_inside)
            takes_gradient = not is_inside and requires_gradient(args)
            stack.append(_Running(module, takes_gradient, is_inside, next(self._numbers)))

    def _after(self, module: nn.Module, args: Any, kwargs: Any, output: Any = None) -> None:
        # After an exception, PyTorch 2.13 leaves out kwargs, so the third argument is the result (None).
        if torch.compiler.is_compiling():
            return
        stack = self._stack()
        while stack:
            running = stack.pop()
            if running.module is module:
                break
        else:
            return
        if not torch.is_grad_enabled():
            return
        takes_gradient = running.takes_gradient or (not running.is_inside and requires_gradient(kwargs))
        if not stack or takes_gradient:
            call = Call(ref(module), site(), place(), takes_gradient, running.began, next(self._numbers))
            mark(output, INNER if stack else OUTPUT, call)
        if not stack and self._returned is not None:
            self._returned(module, args, kwargs)

    def _stack(self) -> list[_Running]:
        stack: list[_Running] = self._depth.__dict__.setdefault("stack", [])
        return stack


class _Hooks(OrderedDict[int, Any]):
    """A module's hooks. Its pickle or copy is a plain dictionary without the launcher's hooks."""

    def _others(self) -> Iterator[tuple[int, Any]]:
        own = _own
        return ((key, value) for key, value in self.items() if key not in own)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return OrderedDict, (), None, None, self._others()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(OrderedDict(self._others()), memo)


_own: set[int] = set()  # ids of the launcher's hooks
_TABLES = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
)
_CALLED = (0, 2)  # the tables with the hooks themselves


def add_hooks(module: nn.Module, before: Callable[..., None], after: Callable[..., None]) -> Callable[[], None] | None:
    """Add hooks around every forward of a module, and return a function that removes them.

    Return None if the module has such hooks already, because their handles refer to the dictionaries that this function
    replaces. Hooks of fastgan's fused spectral norm have no handles, so they may stay.
    """
    tables = [vars(module).get(name) or {} for name in _TABLES]
    if not all(isinstance(getattr(hook, "__self__", None), _Fused) for i in _CALLED for hook in tables[i].values()):
        return None
    for name, table in zip(_TABLES, tables, strict=True):
        vars(module)[name] = _Hooks(table)
    handles = [
        module.register_forward_pre_hook(before, with_kwargs=True),
        module.register_forward_hook(after, with_kwargs=True, always_call=True),
    ]
    _own.update(handle.id for handle in handles)

    def remove() -> None:
        for handle in handles:
            handle.remove()

    return remove
