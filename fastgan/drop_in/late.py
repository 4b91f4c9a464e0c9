"""Extensions that are compiled at their first use. The functions that are replaced never use them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any


class CompiledLate:
    """An extension that is compiled when one of its functions is looked up."""

    def __init__(self, compile_now: Callable[[], Any]) -> None:
        self._compile_now = compile_now
        self._extension: Any = None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # a look at the object, not a use of the extension
            raise AttributeError(name)
        if self._extension is None:
            self._extension = self._compile_now()
        return getattr(self._extension, name)


@contextmanager
def late_compilation() -> Iterator[None]:
    """Inside this context, torch.utils.cpp_extension compiles no Python modules. They would be compiled at an import.

    Libraries that are no Python modules register their operators when they are loaded, so they are not postponed.
    """
    try:
        from torch.utils import cpp_extension
    except ImportError:  # it needs setuptools
        yield
        return
    originals = {name: getattr(cpp_extension, name) for name in ("load", "load_inline")}

    def later(original: Any) -> Any:
        @wraps(original)
        def load(*args: Any, **named: Any) -> Any:
            if not named.get("is_python_module", True) or named.get("is_standalone", False):
                return original(*args, **named)
            return CompiledLate(partial(original, *args, **named))

        return load

    for name, original in originals.items():
        setattr(cpp_extension, name, later(original))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(cpp_extension, name, original)
