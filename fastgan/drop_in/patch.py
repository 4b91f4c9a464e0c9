"""Replace functions in modules that are already imported, and in others when they are imported."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial, wraps
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, ClassVar, NamedTuple

from fastgan.drop_in.late import CompiledLate, late_compilation
from fastgan.drop_in.signatures import in_place_of, why_not
from fastgan.drop_in.tables import Functions

_log = logging.getLogger("fastgan")


class _Replaced(NamedTuple):
    module: ModuleType
    name: str
    original: Any
    replacement: Any


class Patch(MetaPathFinder):
    """An import hook that replaces functions in new modules, and the list of all replaced functions."""

    _active: ClassVar[Patch | None] = None

    def __init__(self, tables: Mapping[str, Functions]) -> None:
        self._tables = tables
        self._replaced: list[_Replaced] = []
        self._refused: list[Any] = []
        self._modules = 0  # number of modules at the last search for functions that were imported by name
        self._is_paused = False

    @classmethod
    def begin(cls, tables: Mapping[str, Functions]) -> Patch:
        if cls._active is None:
            cls._active = cls(tables)
            sys.meta_path.insert(0, cls._active)
        for name, module in [*sys.modules.items()]:  # at each call: some modules are made without an import
            cls._active._replace_in(name, module)
        return cls._active

    @property
    def replaced(self) -> list[str]:
        """The names of the functions that were replaced so far, each with the module that holds it."""
        self._add_imports_by_name()
        return [f"{entry.module.__name__}.{entry.name}" for entry in self._replaced]

    def restore(self) -> None:
        """Restore the original functions. Modules that are imported later are not patched."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        if Patch._active is self:
            Patch._active = None
        self._add_imports_by_name()
        for module, name, original, replacement in reversed(self._replaced):
            if vars(module).get(name) is replacement:
                setattr(module, name, original)
        self._replaced.clear()

    def pause(self, is_paused: bool) -> None:
        """Install the original functions, or the replacements again."""
        if self._modules != len(sys.modules):
            self._add_imports_by_name()
        self._is_paused = is_paused
        for module, name, original, replacement in self._replaced:
            held, other = (replacement, original) if is_paused else (original, replacement)
            if vars(module).get(name) is held:
                setattr(module, name, other)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if self._functions(fullname) is None:
            return None
        for finder in sys.meta_path:
            find = getattr(finder, "find_spec", None)
            spec = find(fullname, path, target) if find is not None and finder is not self else None
            if spec is not None:
                self._watch(spec)
                return spec  # type: ignore[no-any-return]
        return None

    def _functions(self, module: str) -> Functions | None:
        for end, functions in self._tables.items():
            if module == end or module.endswith("." + end):
                return functions
        return None

    def _watch(self, spec: ModuleSpec) -> None:
        """Patch the module as soon as it is loaded."""
        loader: Any = spec.loader
        load = getattr(loader, "exec_module", None)
        if load is None:
            return

        def load_and_replace(module: ModuleType) -> None:
            if self is not Patch._active:  # restored, and the loader is used again
                load(module)
                return
            with late_compilation():
                load(module)
            self._replace_in(vars(module).get("__name__", ""), module)  # the loader of an archive has many modules

        loader.exec_module = load_and_replace

    def _replace_in(self, module_name: str, module: ModuleType) -> None:
        functions = self._functions(module_name)
        if functions is None or not isinstance(module, ModuleType):
            return
        for name, function in functions.items():
            original = vars(module).get(name)
            known = (*(entry.replacement for entry in self._replaced), *self._refused)
            if not callable(original) or isinstance(original, ModuleType) or any(original is one for one in known):
                continue
            if self._is_paused and any(original is entry.original for entry in self._replaced):
                continue
            if function is CompiledLate:
                replacement = self._late(original)
            else:
                reason = why_not(original, function)
                if reason is not None:
                    self._refused.append(original)
                    _log.warning("%s.%s is not replaced: %s", module_name, name, reason)
                    continue
                replacement = in_place_of(original, function)
            for holder, held in [*_holders(original)]:
                if not self._is_paused:
                    setattr(holder, held, replacement)
                self._replaced.append(_Replaced(holder, held, original, replacement))

    def _late(self, get_plugin: Any) -> Any:
        """Wrap a function that compiles an extension: those of modules that need none now are compiled late."""

        @wraps(get_plugin)
        def late(*args: Any, **named: Any) -> Any:
            caller = sys._getframe(1).f_globals.get("__name__")
            homes = {entry.original.__module__ for entry in self._replaced}
            if caller not in homes - {function.__module__ for function in self._refused}:
                return get_plugin(*args, **named)
            return CompiledLate(partial(get_plugin, *args, **named))

        return late

    def _add_imports_by_name(self) -> None:
        """Add the modules that imported a function by name since its replacement."""
        self._modules = len(sys.modules)
        known = {(id(entry.module), entry.name) for entry in self._replaced}
        entries = {id(function): entry for entry in self._replaced for function in (entry.original, entry.replacement)}
        for module in [*sys.modules.values()]:
            if isinstance(module, ModuleType):
                for name, value in [*vars(module).items()]:
                    entry = entries.get(id(value))
                    if entry is not None and (id(module), name) not in known:
                        self._replaced.append(entry._replace(module=module, name=name))


def _holders(function: Any) -> Iterator[tuple[ModuleType, str]]:
    """Yield each module that has this function, and its name there: where it is defined and where it is imported."""
    for module in [*sys.modules.values()]:
        if isinstance(module, ModuleType):
            for name, value in [*vars(module).items()]:
                if value is function:
                    yield module, name
