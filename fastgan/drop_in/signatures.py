"""Whether one function can stand for another, and a copy of it that does."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from inspect import Parameter
from types import FunctionType
from typing import Any

_ANY = {Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD}


def why_not(original: Callable[..., Any], function: Callable[..., Any]) -> str | None:
    """Return why the function cannot stand for the original, or None if it can."""
    theirs, ours = _parameters(original), _parameters(function)
    if theirs is None or ours is None or [*theirs] != [*ours][: len(theirs)]:
        return "its parameters differ from fastgan's"
    for name, parameter in theirs.items():
        given, own = parameter.default, ours[name].default
        if given is not Parameter.empty and (given is None) != (own is None):
            return f"the default of its parameter {name}, {given!r}, is of another kind than fastgan's, {own!r}"
    return None


def in_place_of(original: Callable[..., Any], function: Callable[..., Any]) -> Any:
    """Return a copy of the function with the name, module and defaults of the original.

    A pickle refers to a function by its name and module, so it does not depend on fastgan.
    """
    assert isinstance(function, FunctionType)
    theirs = _parameters(original) or {}
    defaults = []
    for name, own in inspect.signature(function).parameters.items():
        if own.default is not Parameter.empty:
            given = theirs[name].default if name in theirs else Parameter.empty
            defaults.append(own.default if given is Parameter.empty else given)
    copy = FunctionType(function.__code__, function.__globals__, function.__name__, tuple(defaults))
    copy.__doc__, copy.__annotations__ = function.__doc__, function.__annotations__
    for name in ("__module__", "__name__", "__qualname__"):
        setattr(copy, name, getattr(original, name, getattr(function, name)))
    return copy


def _parameters(function: Any) -> dict[str, Parameter] | None:
    """Return the parameters of a function, also where a decorator without functools.wraps hides them."""
    try:
        found = dict(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return None
    if {parameter.kind for parameter in found.values()} == _ANY:
        inside = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
        decorated = [value for value in inside if inspect.isfunction(value)]
        return _parameters(decorated[0]) if len(decorated) == 1 else None
    return found
