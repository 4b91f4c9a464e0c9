"""Replace functions in modules that are already imported, and in others when they are imported."""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, ClassVar, NamedTuple

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
        self._is_paused = False

    @classmethod
    def begin(cls, tables: Mapping[str, Functions]) -> Patch:
        if cls._active is None:
            cls._active = patch = cls(tables)
            sys.meta_path.insert(0, patch)
            for name, module in [*sys.modules.items()]:
                patch._replace_in(name, module)
        return cls._active

    @property
    def replaced(self) -> list[str]:
        """The names of the functions that were replaced so far, each with the module that holds it."""
        return [f"{entry.module.__name__}.{entry.name}" for entry in self._replaced]

    def restore(self) -> None:
        """Restore the original functions. Modules that are imported later are not patched."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        if Patch._active is self:
            Patch._active = None
        for module, name, original, replacement in reversed(self._replaced):
            if vars(module).get(name) is replacement:
                setattr(module, name, original)
        self._replaced.clear()

    def pause(self, is_paused: bool) -> None:
        """Install the original functions, or the replacements again."""
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
            with _no_compilation():
                load(module)
            self._replace_in(spec.name, module)

        loader.exec_module = load_and_replace  # each module has its own loader

    def _replace_in(self, module_name: str, module: ModuleType) -> None:
        functions = self._functions(module_name)
        if functions is None or not isinstance(module, ModuleType):
            return
        for name, replacement in functions.items():
            original = vars(module).get(name)
            if not callable(original) or original is replacement or isinstance(original, ModuleType):
                continue
            if not _has_parameters_of(original, replacement):
                _log.warning("%s.%s is not replaced: its parameters differ from fastgan's", module_name, name)
                continue
            for holder, held in [*_holders(original)]:
                if not self._is_paused:
                    setattr(holder, held, replacement)
                self._replaced.append(_Replaced(holder, held, original, replacement))


def _holders(function: Any) -> Iterator[tuple[ModuleType, str]]:
    """Yield each module that has this function, and its name there: where it is defined and where it is imported."""
    for module in [*sys.modules.values()]:
        if isinstance(module, ModuleType):
            for name, value in [*vars(module).items()]:
                if value is function:
                    yield module, name


def _has_parameters_of(original: Callable[..., Any], replacement: Callable[..., Any]) -> bool:
    """Return whether the replacement has the parameters of the original, in the same order."""
    try:
        parameters = [*inspect.signature(original).parameters]
    except (TypeError, ValueError):
        return False
    return [*inspect.signature(replacement).parameters][: len(parameters)] == parameters


class _NotCompiled:
    """A stand-in for a compiled extension whose functions are replaced."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(f"{name}: fastgan.patch_torch_utils() replaces this extension, which was not compiled")


@contextmanager
def _no_compilation() -> Iterator[None]:
    """Inside this context, torch.utils.cpp_extension compiles nothing. The modules would compile at their import."""
    try:
        from torch.utils import cpp_extension
    except ImportError:  # it needs setuptools
        yield
        return
    names = ("load", "load_inline")
    originals = {name: getattr(cpp_extension, name) for name in names}
    for name in names:
        setattr(cpp_extension, name, lambda *args, **kwargs: _NotCompiled())
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(cpp_extension, name, original)
