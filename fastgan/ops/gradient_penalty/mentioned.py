"""Search the code that a module runs for names, before a call of the module is no longer intercepted.

A later call may take another branch of the same code: ``if self.attend: F.scaled_dot_product_attention(...)``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import partial
from types import CodeType, FunctionType, MethodType
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

_DEPTH = 4  # of functions within functions

_in_classes: WeakKeyDictionary[type, frozenset[str]] = WeakKeyDictionary()


def names_in_modules(modules: Iterable[nn.Module]) -> set[str]:
    """Return the names in the methods of these modules' classes, their attributes and their hooks."""
    found: set[str] = set()
    for module in modules:
        found |= _names_in_class(type(module))
        hooks = *module._forward_pre_hooks.values(), *module._forward_hooks.values()
        attributes = [value for value in vars(module).values() if callable(value)]
        for function in (*attributes, *hooks):
            found.update(names_in(function))
    return found


def names_in(function: Any) -> Iterator[str]:
    """Yield all names in a function, in the functions of its closure, and in the global functions that it calls."""
    yield from _names_in(function, set(), _DEPTH)


def names_in_code(code: CodeType) -> Iterator[str]:
    """Yield the names in a function's code, and in the code of functions that it defines."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from names_in_code(constant)


def _names_in_class(cls: type) -> frozenset[str]:
    names = _in_classes.get(cls)
    if names is None:
        owners = [owner for owner in cls.__mro__ if owner not in nn.Module.__mro__]
        methods = [value for owner in owners for value in vars(owner).values()]
        names = _in_classes[cls] = frozenset(name for method in methods for name in names_in(method))
    return names


def _names_in(function: Any, seen: set[CodeType], depth: int) -> Iterator[str]:
    if isinstance(function, MethodType | staticmethod | classmethod):
        function = function.__func__
    elif isinstance(function, property):
        function = function.fget
    elif isinstance(function, partial):
        for part in (function.func, *function.args, *function.keywords.values()):
            yield from _names_in(part, seen, depth)
        return
    elif not isinstance(function, FunctionType) and callable(function) and not isinstance(function, type):
        function = type(function).__call__
    if not isinstance(function, FunctionType) or function.__code__ in seen or depth == 0:
        return
    if function.__module__ is not None and function.__module__.startswith("torch.nn.functional"):
        yield function.__name__
        return
    seen.add(function.__code__)
    names = set(names_in_code(function.__code__))
    yield from names
    around = [*_contents(function), *(function.__globals__[name] for name in names & function.__globals__.keys())]
    for value in (*around, getattr(function, "__wrapped__", None)):
        if isinstance(value, FunctionType | MethodType | partial):
            yield from _names_in(value, seen, depth - 1)


def _contents(function: FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # not yet assigned
            yield cell.cell_contents
