"""Change the class of a module in place, and back. Its tensors, keys, hooks and place in the model do not change."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from functools import update_wrapper
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import nn

from fastgan.ops.library import is_traced

_SETTINGS = "_fastgan"
_MODULE_ATTRIBUTES = frozenset(vars(nn.Module())) | frozenset(vars(nn.Module))


class Replacement:
    """Base of a converted module's class. It precedes the module's original class in the bases.

    ``replacement`` replaces one method or property of the original class. It reads its settings from the dictionary
    ``self._fastgan``. It was compared with the original for one kind of call and for the attributes at that time. The
    original code handles all other calls, and all calls under a tracer or compiler.

    ``around``, if it is set, replaces ``forward`` and receives the original forward as its first argument.
    ``runs_original``, if it is set, receives the arguments of a call and tells, at a low cost, whether the original
    code handled an equal call before.
    """

    replacement: Any
    around: Any = None
    runs_original: Any = None

    def is_as_compared(self, *args: Any, **kwargs: Any) -> bool:
        attributes: dict[str, Any] = self.__dict__[_SETTINGS]["attributes"]
        return not kwargs and all(getattr(self, name, None) == value for name, value in attributes.items())


def become(module: nn.Module, mixin: type[Replacement], attribute: str, **settings: Any) -> None:
    """Make ``mixin.replacement`` the module's ``attribute``."""
    module.__dict__[_SETTINGS] = {"attributes": _plain_attributes(module), **settings}
    module.__class__ = _class(type(module), mixin, attribute)


def can_become(module: nn.Module, attribute: str) -> bool:
    """Return whether the module's ``attribute`` comes from its class, not from the instance."""
    return attribute not in vars(module)


def _plain_attributes(module: nn.Module) -> dict[str, Any]:
    """Return the simple attributes of the layer and its classes, which a user may change between two calls."""
    classes = [cls for cls in type(module).__mro__ if cls not in nn.Module.__mro__]
    found = {name: value for owner in (*reversed(classes), module) for name, value in vars(owner).items()}
    return {
        name: value
        for name, value in found.items()
        if isinstance(value, bool | int | float | str | None)
        and name not in _MODULE_ATTRIBUTES
        and not name.startswith("__")
    }


def changed_attributes(tried: nn.Module, original: nn.Module) -> list[str]:
    """Return the names of the simple attributes that calls of a copy have changed, such as counters."""
    now, before = _plain_attributes(tried), _plain_attributes(original)
    return sorted(name for name in now.keys() | before.keys() if now.get(name) != before.get(name))


def is_converted(module: nn.Module) -> bool:
    return isinstance(module, Replacement)


def restore(module: nn.Module) -> None:
    base, _, _ = made_from(module)
    cls: Any = type(module)
    module.__dict__.pop(_SETTINGS, None)
    if "_fastgan_made_from" in vars(cls):
        module.__class__ = base
        return
    # A class was derived from the converted class since then, for example by torch.nn.utils.parametrize. Derive the
    # same class from the base.
    bases = tuple(base if "_fastgan_made_from" in vars(b) else b for b in cls.__bases__)
    contents = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
    metaclass: Any = type(cls)
    module.__class__ = metaclass(cls.__name__, bases, contents)


_classes: dict[tuple[Any, Any, str], type[nn.Module]] = {}


def _class(base: type[nn.Module], mixin: type[Replacement], attribute: str) -> type[nn.Module]:
    key = base, mixin, attribute
    if key not in _classes:
        _classes[key] = _make_class(*key)
    return _classes[key]


def _make_class(base: type[nn.Module], mixin: type[Replacement], attribute: str) -> type[nn.Module]:
    original = getattr(base, attribute)
    own: Any = original.fget if isinstance(original, property) else original
    defaults = _Defaults.of(own)  # outside of `chosen`, because Dynamo of torch 2.6 cannot read them

    def around(self: Any, *args: Any, **kwargs: Any) -> Any:
        if is_traced():
            return base.forward(self, *args, **kwargs)
        return mixin.around(self, base.forward, *args, **kwargs)

    def chosen(self: Any, *args: Any, **kwargs: Any) -> Any:
        if mixin.runs_original and not torch.compiler.is_dynamo_compiling() and self.runs_original(args, kwargs):
            return own(self, *args, **kwargs)
        if is_traced():
            return own(self, *args, **kwargs)
        given, named = defaults.left_out(args, kwargs)
        if not self.is_as_compared(*given, **named):
            return own(self, *args, **kwargs)
        return mixin.replacement(self, *given, **named)

    def initialize(self: Any, *args: Any, **kwargs: Any) -> None:
        self.__class__ = base  # a new module, such as a slice of a Sequential, is not converted
        base.__init__(self, *args, **kwargs)

    in_place = _with_signature_of(own, chosen)
    contents = {
        # The class has the name of its base, so that code can still find the layer by name.
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__init__": update_wrapper(initialize, base.__init__),
        "__reduce_ex__": _reduce,
        "_fastgan_made_from": (base, mixin, attribute),
        attribute: property(in_place, doc=original.__doc__) if isinstance(original, property) else in_place,
    }
    if mixin.around is not None:
        contents["forward"] = _with_signature_of(base.forward, around)
    metaclass: Any = type(base)
    made: type[nn.Module] = metaclass(base.__name__, (mixin, base), contents)
    return made


def _with_signature_of(own: Any, chosen: Callable[..., Any]) -> Any:
    """Make a function that calls ``chosen`` and has the parameters, defaults, names and scope of ``own``.

    `inspect`, torch.fx and torch.jit.script then see ``own``. torch.jit.script compiles the source of ``own`` and looks
    up names in the scope of the function that it receives.
    """
    if not isinstance(own, FunctionType):
        return update_wrapper(chosen, own)
    code = own.__code__
    positional, named = code.co_argcount, code.co_kwonlyargcount
    names = iter(code.co_varnames)
    before = [next(names) for _ in range(positional)]
    after = [next(names) for _ in range(named)]
    rest = f"*{next(names)}" if code.co_flags & inspect.CO_VARARGS else None
    more = [f"**{next(names)}"] if code.co_flags & inspect.CO_VARKEYWORDS else []
    declared = before.copy()
    if code.co_posonlyargcount:
        declared.insert(code.co_posonlyargcount, "/")
    declared += [rest] if rest else ["*"] if named else []
    passed = [*before, *([rest] if rest else []), *(f"{name}={name}" for name in after), *more]
    scope = ["_chosen", *code.co_freevars]
    source = (
        f"def make({', '.join(scope)}):\n"
        f"    def call({', '.join([*declared, *after, *more])}):\n"
        f"        if False: {', '.join(scope)}\n"  # captures the closure variables of `own`
        f"        return _chosen({', '.join(passed)})\n"
        f"    return call\n"
    )
    made: dict[str, Any] = {}
    exec(compile(source, f"<fastgan: {own.__qualname__}>", "exec"), made)
    shell = made["make"](*[None] * len(scope))
    cells = dict(zip(code.co_freevars, own.__closure__ or (), strict=True))
    cells["_chosen"] = (lambda: chosen).__closure__[0]  # type: ignore[index]
    closure = tuple(cells[name] for name in shell.__code__.co_freevars)
    call = FunctionType(shell.__code__, own.__globals__, own.__name__, own.__defaults__, closure)
    call.__kwdefaults__ = own.__kwdefaults__
    return update_wrapper(call, own)


class _Defaults(NamedTuple):
    """The defaults of a method."""

    required: int  # positional parameters without a default, apart from self
    positional: tuple[Any, ...]
    named: dict[str, Any]

    @classmethod
    def of(cls, method: Any) -> _Defaults:
        if not isinstance(method, FunctionType):
            return cls(0, (), {})
        positional = method.__defaults__ or ()
        return cls(method.__code__.co_argcount - 1 - len(positional), positional, method.__kwdefaults__ or {})

    def left_out(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Remove trailing positional arguments and keyword arguments that equal the defaults."""
        if len(args) <= self.required + len(self.positional):
            while len(args) > self.required and args[-1] is self.positional[len(args) - 1 - self.required]:
                args = args[:-1]
        if kwargs and self.named:
            kwargs = {n: v for n, v in kwargs.items() if n not in self.named or v is not self.named[n]}
        return args, kwargs


def made_from(module: nn.Module) -> tuple[type[nn.Module], type[Replacement], str]:
    cls: Any = type(module)
    made: tuple[type[nn.Module], type[Replacement], str] = cls._fastgan_made_from
    return made


def _reduce(module: nn.Module, protocol: Any) -> tuple[Any, ...]:
    base, mixin, attribute = made_from(module)
    if _is_found_by_name(base) and base.__reduce_ex__ is object.__reduce_ex__ and base.__reduce__ is object.__reduce__:
        reduced: Any = object.__reduce_ex__(module, 2)
        _, arguments, *state = reduced
        return _rebuild, (base, mixin, attribute, *arguments[1:]), *state
    # The class has its own way of pickling, for example one that includes its source code.
    plain = base.__new__(base)
    plain.__dict__ = {name: value for name, value in module.__dict__.items() if name != _SETTINGS}
    return _convert_again, (plain, mixin, attribute, module.__dict__[_SETTINGS])


def _is_found_by_name(cls: type) -> bool:
    found: Any = sys.modules.get(cls.__module__)
    for name in cls.__qualname__.split("."):
        found = getattr(found, name, None)
    return found is cls


def _rebuild(base: type[nn.Module], mixin: type[Replacement], attribute: str, *arguments: Any) -> nn.Module:
    cls = _class(base, mixin, attribute)
    return cls.__new__(cls, *arguments)


def _convert_again(module: nn.Module, mixin: type[Replacement], attribute: str, settings: dict[str, Any]) -> nn.Module:
    become(module, mixin, attribute, **settings)
    return module
