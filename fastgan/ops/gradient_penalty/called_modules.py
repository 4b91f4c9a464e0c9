"""Find the modules that a discriminator calls. It may be a module, a method of one, or a function that uses some."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import suppress
from functools import cache, partial
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fastgan import backends
from fastgan.ops.gradient_penalty.mentioned import names_in_code, names_in_modules
from fastgan.ops.gradient_penalty.size import all_modules
from fastgan.torch_private import RemovableHandle

_DEPTH = 4  # of functions within functions
_MOST = 64  # elements of a list that are searched
_MOST_MODULES = 1024  # of a model that is remembered; a larger one may contain itself
_PLAIN = (int, float, complex, str, bytes, bool, type(None), type, ModuleType, BuiltinFunctionType, torch.dtype)

_FUNCTIONS = frozenset((FunctionType, MethodType, partial))
_OF_TORCH = frozenset(value for value in vars(nn).values() if isinstance(value, type))

# The global names in a function's code. Their values may change, so they are looked up at each call.
_names: WeakKeyDictionary[CodeType, tuple[str, ...]] = WeakKeyDictionary()


class Unknown(Exception):
    """An object was found that may hold any number of parameters."""


def called_modules(discriminator: Any) -> list[nn.Module] | None:
    """Return the modules that a call of the discriminator may run, or None if they are not known."""
    if isinstance(discriminator, nn.Module):
        return [discriminator]
    found: dict[int, nn.Module] = {}
    try:
        _look(discriminator, found, _DEPTH)
    except Unknown:
        return None
    return list(found.values()) or None


def reachable_modules(discriminator: Any) -> list[nn.Module]:
    """Return all modules that can be found from the discriminator, including some that a call may not run."""
    found: list[nn.Module] = []
    seen: dict[int, Any] = {}
    waiting = [(discriminator, _DEPTH)]
    while waiting:
        value, depth = waiting.pop()
        if id(value) in seen:
            continue
        seen[id(value)] = value  # keeps it alive, so that no other object gets its id
        if isinstance(value, nn.Module):
            found.append(value)
        elif depth:
            waiting += [(part, depth - 1) for part in _parts(value)]
    return all_modules(found)


def _parts(value: Any) -> list[Any]:
    """Return the objects that a function, a container or another object refers to."""
    if isinstance(value, (Tensor, *_PLAIN)):
        return []
    if isinstance(value, MethodType):
        return [value.__self__, value.__func__]
    if isinstance(value, partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, FunctionType):
        if _is_torchs(value):
            return []
        defaults = *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()
        names = [value.__globals__[name] for name in _global_names(value)]
        return [*_contents(value), *defaults, *names, *vars(value).values()]
    if isinstance(value, tuple | list | set | frozenset | Mapping):
        return [] if len(value) > _MOST else [*(value.values() if isinstance(value, Mapping) else value)]
    return [*getattr(value, "__dict__", {}).values()]


def _contents(function: FunctionType) -> list[Any]:
    """Return the values of the variables of enclosing functions that are assigned."""
    contents = []
    for cell in function.__closure__ or ():
        with suppress(ValueError):
            contents.append(cell.cell_contents)
    return contents


def _is_torchs(function: FunctionType) -> bool:
    return function.__module__ is not None and function.__module__.partition(".")[0] == "torch"


def code_of(discriminator: Any) -> CodeType | None:
    """Return the code of a function. It identifies a function that is defined anew for each call, such as a lambda."""
    if isinstance(discriminator, partial):
        discriminator = discriminator.func
    code = getattr(discriminator, "__code__", None)
    return code if isinstance(code, CodeType) else None


class Call(NamedTuple):
    """The only module that a call runs, and everything else that its checks and the functions that it calls depend on.

    An equal call passes the same checks and calls the same functions.
    """

    module: nn.Module
    details: tuple[Any, ...]

    def names(self) -> set[str]:
        """Return the names in the code that a call may run."""
        code = self.details[0]
        return names_in_modules(all_modules([self.module])).union(names_in_code(code) if code else ())


def call_of(
    discriminator: Any, inputs: tuple[Any, ...], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
) -> Call | None:
    """Identify a call of the discriminator. Return None unless it depends on exactly one module.

    Args:
        inputs: the arguments of the penalty that decide at which points it calls the discriminator, and these points.
    """
    if isinstance(discriminator, nn.Module):
        module, code, values = discriminator, None, inputs
    else:
        around = _around(discriminator)
        if around is None:
            return None
        module, code, more = around
        values = (*inputs, *more)
    if args or kwargs:
        values = (*values, args, kwargs)
    structure = _walk()(module, _OF_TORCH, _FUNCTIONS, RemovableHandle.next_id > 0, _MOST_MODULES)
    if structure is None:
        return None
    details: list[Any] = [code, module.training, structure]
    try:
        for value in values:  # the common cases are inline
            if type(value) is Tensor:
                details += value.shape, value.dtype, value.device
            elif value is None or type(value) is str:
                details.append(value)
            else:
                details.append(_described(value))
    except Unknown:
        return None
    return tuple.__new__(Call, (module, tuple(details)))  # Call(...) is a function of Python


@cache
def _walk() -> Callable[..., int | None]:
    """Return the function ``structure`` of the compiled module, or Python's."""
    walk: Callable[..., int | None] = getattr(backends.native(), "structure", _structure)
    return walk


def _structure(
    module: nn.Module, of_torch: frozenset[type], functions: frozenset[type], with_hooks: bool, most: int
) -> int | None:
    """Return a number that changes if modules inside this one, their functions or their hooks are replaced.

    Return None if there are more than ``most`` modules. Shared modules count repeatedly.
    """
    found: list[Any] = []
    modules = [module]
    for each in modules:  # it grows meanwhile
        cls, own = type(each), each.__dict__
        found.append(cls)
        if cls not in of_torch or "forward" in own:
            found += [(name, id(v)) for name, v in own.items() if type(v) in functions or name == "forward"]
        modules += [child for child in each._modules.values() if child is not None]
        if len(modules) > most:
            return None
        if with_hooks:
            for hooks in (each._forward_hooks, each._forward_pre_hooks, each._backward_hooks, each._backward_pre_hooks):
                found += hooks  # the ids of the hooks
    return hash(tuple(found))


def _described(value: Any) -> Hashable:
    """Return the properties of a value that can change the checks of a call or the functions that it runs."""
    if isinstance(value, Tensor):
        return type(value), value.shape, value.dtype, value.device
    if value is None or isinstance(value, int | float | str | type):
        return type(value), value
    if isinstance(value, tuple | list) and len(value) <= _MOST:
        return type(value), *map(_described, value)
    if isinstance(value, Mapping):
        return type(value), _described(tuple(value)), _described(tuple(value.values()))
    raise Unknown


def _around(function: Any) -> tuple[nn.Module, CodeType, list[Any]] | None:
    """Return the only module that a function or method refers to, its code, and all other values that it refers to."""
    values = []
    if isinstance(function, MethodType):
        values, function = [function.__self__], function.__func__
    if not isinstance(function, FunctionType):
        return None
    values += [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    try:
        values += [cell.cell_contents for cell in function.__closure__ or ()]
    except ValueError:  # not yet assigned
        return None
    values += [function.__globals__[name] for name in _global_names(function)]
    values = [value for value in values if not isinstance(value, ModuleType)]
    modules = [value for value in values if isinstance(value, nn.Module)]
    if len(modules) != 1:
        return None
    return modules[0], function.__code__, [value for value in values if value is not modules[0]]


def _global_names(function: FunctionType) -> list[str]:
    names = _names.get(function.__code__)
    if names is None:
        names = _names[function.__code__] = tuple(names_in_code(function.__code__))
    return [name for name in names if name in function.__globals__]


def _look(value: Any, found: dict[int, nn.Module], depth: int) -> None:
    if isinstance(value, nn.Module):
        found[id(value)] = value
    elif isinstance(value, MethodType):
        if not isinstance(value.__self__, nn.Module):
            raise Unknown
        _look(value.__self__, found, depth)
    elif isinstance(value, partial):
        for part in (value.func, *value.args, *value.keywords.values()):
            _look(part, found, depth)
    elif isinstance(value, FunctionType):
        _look_into(value, found, depth)
    elif isinstance(value, tuple | list) and len(value) <= _MOST:
        for part in value:
            _look(part, found, depth)
    elif isinstance(value, Tensor):
        if value.requires_grad and value.is_leaf:  # a parameter outside any module
            raise Unknown
    elif not isinstance(value, _PLAIN):
        raise Unknown


def _look_into(function: FunctionType, found: dict[int, nn.Module], depth: int) -> None:
    if _is_torchs(function):
        return  # torch's functions have no parameters
    if depth == 0:
        raise Unknown
    for cell in function.__closure__ or ():
        try:
            content = cell.cell_contents
        except ValueError:  # not yet assigned
            raise Unknown from None
        if content is not function:
            _look(content, found, depth - 1)
    for default in function.__defaults__ or ():
        _look(default, found, depth - 1)
    for name in _global_names(function):
        value = function.__globals__[name]
        if value is not function:
            _look(value, found, depth - 1)
