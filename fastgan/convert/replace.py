"""A module changes its class in place, and back: its tensors, keys, hooks and place in the model stay as they are."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

_SETTINGS = "_fastgan"
_EVERY_MODULES = frozenset(vars(nn.Module())) | frozenset(vars(nn.Module))


class Replacement:
    """What a converted module's class is made of: this, before the class that the module had.

    ``replacement`` takes the place of one method or property of that class. It finds what it needs to know in
    ``self._fastgan``, a dictionary. It was compared with one kind of call, on the layer's attributes as they were then:
    any other call is for the class's own code.
    """

    replacement: Any

    def is_as_compared(self, *args: Any, **kwargs: Any) -> bool:
        attributes: dict[str, Any] = self.__dict__[_SETTINGS]["attributes"]
        return not kwargs and all(getattr(self, name, None) == value for name, value in attributes.items())


def become(module: nn.Module, mixin: type[Replacement], attribute: str, **settings: Any) -> None:
    """Let ``mixin.replacement`` be the module's ``attribute``."""
    module.__dict__[_SETTINGS] = {"attributes": _plain_attributes(module), **settings}
    module.__class__ = _class(type(module), mixin, attribute)


def _plain_attributes(module: nn.Module) -> dict[str, Any]:
    """Numbers and the like, the layer's and its classes', which whoever has it may change between two calls."""
    classes = [cls for cls in type(module).__mro__ if cls not in nn.Module.__mro__]
    found = {name: value for owner in (*reversed(classes), module) for name, value in vars(owner).items()}
    return {
        name: value
        for name, value in found.items()
        if isinstance(value, bool | int | float | str | None)
        and name not in _EVERY_MODULES
        and not name.startswith("__")
    }


def is_converted(module: nn.Module) -> bool:
    return isinstance(module, Replacement)


def restore(module: nn.Module) -> None:
    base, _, _ = made_from(module)
    del module.__dict__[_SETTINGS]
    module.__class__ = base


_classes: dict[tuple[Any, Any, str], type[nn.Module]] = {}


def _class(base: type[nn.Module], mixin: type[Replacement], attribute: str) -> type[nn.Module]:
    key = base, mixin, attribute
    if key not in _classes:
        _classes[key] = _make_class(*key)
    return _classes[key]


def _make_class(base: type[nn.Module], mixin: type[Replacement], attribute: str) -> type[nn.Module]:
    there = getattr(base, attribute)
    own: Any = there.fget if isinstance(there, property) else there

    def chosen(self: Any, *args: Any, **kwargs: Any) -> Any:
        return (mixin.replacement if self.is_as_compared(*args, **kwargs) else own)(self, *args, **kwargs)

    replacement = property(chosen) if isinstance(there, property) else chosen
    # Under the name of its base: whoever looks for a layer by name finds it still.
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    made_from = {"_fastgan_made_from": (base, mixin, attribute)}
    return type(base.__name__, (mixin, base), {**names, **made_from, attribute: replacement, "__reduce_ex__": _reduce})


def made_from(module: nn.Module) -> tuple[type[nn.Module], type[Replacement], str]:
    cls: Any = type(module)
    made: tuple[type[nn.Module], type[Replacement], str] = cls._fastgan_made_from
    return made


def _reduce(module: nn.Module, protocol: Any) -> tuple[Any, ...]:
    base, mixin, attribute = made_from(module)
    if _is_found_by_name(base) and base.__reduce_ex__ is object.__reduce_ex__ and base.__reduce__ is object.__reduce__:
        return _rebuild, (base, mixin, attribute), module.__dict__
    # A class with a way of its own of being pickled, as those that carry their source code with them.
    plain = base.__new__(base)
    plain.__dict__ = {name: value for name, value in module.__dict__.items() if name != _SETTINGS}
    return _convert_again, (plain, mixin, attribute, module.__dict__[_SETTINGS])


def _is_found_by_name(cls: type) -> bool:
    found: Any = sys.modules.get(cls.__module__)
    for name in cls.__qualname__.split("."):
        found = getattr(found, name, None)
    return found is cls


def _rebuild(base: type[nn.Module], mixin: type[Replacement], attribute: str) -> nn.Module:
    cls = _class(base, mixin, attribute)
    return cls.__new__(cls)


def _convert_again(module: nn.Module, mixin: type[Replacement], attribute: str, settings: dict[str, Any]) -> nn.Module:
    become(module, mixin, attribute, **settings)
    return module
