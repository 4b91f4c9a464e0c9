"""Replace functions of modules that are imported already, and of others as they are imported."""

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
    ours: Any


class Patch(MetaPathFinder):
    """What was replaced, and the finder that replaces what is imported from now on."""

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
        """The names of the functions that were replaced so far, by the modules that hold them."""
        return [f"{entry.module.__name__}.{entry.name}" for entry in self._replaced]

    def restore(self) -> None:
        """Put the original functions back, and leave what is imported later as it is."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        if Patch._active is self:
            Patch._active = None
        for module, name, original, ours in reversed(self._replaced):
            if vars(module).get(name) is ours:
                setattr(module, name, original)
        self._replaced.clear()

    def pause(self, is_paused: bool) -> None:
        """Put the originals back for a while, or end this."""
        self._is_paused = is_paused
        for module, name, original, ours in self._replaced:
            held, other = (ours, original) if is_paused else (original, ours)
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
        """Have the module patched as soon as it is loaded."""
        loader: Any = spec.loader
        load = getattr(loader, "exec_module", None)
        if load is None:
            return

        def load_and_replace(module: ModuleType) -> None:
            with _nothing_compiled():
                load(module)
            self._replace_in(spec.name, module)

        loader.exec_module = load_and_replace  # of this loader alone: each module has its own

    def _replace_in(self, module_name: str, module: ModuleType) -> None:
        functions = self._functions(module_name)
        if functions is None or not isinstance(module, ModuleType):
            return
        for name, ours in functions.items():
            original = vars(module).get(name)
            if not callable(original) or original is ours or isinstance(original, ModuleType):
                continue
            if not _takes(ours, original):
                _log.warning("%s.%s has other parameters than fastgan's and is left as it is", module_name, name)
                continue
            for holder, held in [*_holders(original)]:
                if not self._is_paused:
                    setattr(holder, held, ours)
                self._replaced.append(_Replaced(holder, held, original, ours))


def _holders(function: Any) -> Iterator[tuple[ModuleType, str]]:
    """The modules that hold this function, and its name there: where it was made, and where it was imported."""
    for module in [*sys.modules.values()]:
        if isinstance(module, ModuleType):
            for name, value in [*vars(module).items()]:
                if value is function:
                    yield module, name


def _takes(ours: Callable[..., Any], original: Callable[..., Any]) -> bool:
    """Whether ours has the parameters of the original, in its order."""
    try:
        theirs = [*inspect.signature(original).parameters]
    except (TypeError, ValueError):
        return False
    return [*inspect.signature(ours).parameters][: len(theirs)] == theirs


class _NotCompiled:
    """Stands for an extension whose functions are replaced."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(f"{name}: fastgan.patch_torch_utils() replaces this extension, which was not compiled")


@contextmanager
def _nothing_compiled() -> Iterator[None]:
    """While a module is loaded, extensions are not compiled: these modules do so as they are imported."""
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
