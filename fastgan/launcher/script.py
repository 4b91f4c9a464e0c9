"""Run a script or a module as ``python`` does: ``__main__``, sys.argv, sys.path[0], exit status, tracebacks."""

from __future__ import annotations

import builtins
import importlib.machinery
import io
import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from types import CodeType, ModuleType, TracebackType
from typing import Any, NoReturn, cast

_LAUNCHER = str(Path(__file__).parent) + os.sep
_kept: list[ModuleType] = []  # the original __main__, whose functions are still on the stack


def run_file(path: str, arguments: Sequence[str]) -> None:
    """Run a script as ``python path arguments`` does. The path "-" is the standard input."""
    if path == "-":
        sys.argv[:] = [path, *arguments]
        _set_first_path("")
        _run(sys.stdin.buffer.read(), _main_module("<stdin>", importlib.machinery.BuiltinImporter, None))
        return
    if os.path.isdir(path) or _is_archive(path):
        sys.argv[:] = [path, *arguments]
        _set_first_path(os.path.abspath(path))
        try:
            _, spec, code = cast(Any, runpy)._get_main_module_details(_NotFound)
        except _NotFound as error:
            _exit(error)
        _run(code, _main_module(spec.origin or path, spec.loader, spec))
        return
    try:
        with io.open_code(path) as file:
            source = file.read()
    except OSError as error:
        print(f"{sys.executable}: can't open file {os.path.abspath(path)!r}: {_reason(error)}", file=sys.stderr)
        raise SystemExit(2) from None
    sys.argv[:] = [path, *arguments]
    _set_first_path(str(Path(path).resolve().parent))
    absolute = os.path.abspath(path)
    module = _main_module(absolute, importlib.machinery.SourceFileLoader("__main__", absolute), None)
    _run(source, module)


def run_module(name: str, arguments: Sequence[str]) -> None:
    """Run a module as ``python -m name arguments`` does."""
    sys.argv[:] = ["-m", *arguments]
    _set_first_path(os.getcwd())
    try:
        _, spec, code = cast(Any, runpy)._get_module_details(name, _NotFound)
    except _NotFound as error:
        _exit(error)
    sys.argv[0] = spec.origin
    _run(code, _main_module(spec.origin, spec.loader, spec))


class _NotFound(Exception):
    pass


def _exit(error: _NotFound) -> NoReturn:
    print(f"{sys.executable}: {error}", file=sys.stderr)
    raise SystemExit(1) from None


def _reason(error: OSError) -> str:
    return f"[Errno {error.errno}] {error.strerror}"


def _is_archive(path: str) -> bool:
    import zipfile

    return os.path.isfile(path) and not path.endswith(".py") and zipfile.is_zipfile(path)


def _set_first_path(folder: str) -> None:
    if not getattr(sys.flags, "safe_path", False):  # since Python 3.11
        sys.path[0:1] = [folder]


def _main_module(path: str, loader: Any, spec: Any) -> ModuleType:
    module = ModuleType("__main__")
    module.__dict__.update(__file__=path, __loader__=loader, __spec__=spec, __builtins__=builtins)
    if spec is not None:
        module.__dict__.update(__package__=spec.parent, __cached__=spec.cached)
    else:
        module.__dict__.update(__package__=None, __cached__=None)
    if "__annotations__" in vars(sys.modules["__main__"]):  # depends on the version of Python
        module.__dict__.update(__annotations__={})
    return module


def _run(code: bytes | CodeType, module: ModuleType) -> None:
    before = sys.modules.get("__main__")
    if before is not None:
        _kept.append(before)
    sys.modules["__main__"] = module
    try:
        if isinstance(code, bytes):
            code = compile(code, module.__dict__["__file__"], "exec", dont_inherit=True)
        exec(code, module.__dict__)
    except SystemExit:
        raise
    except BaseException:
        # The interpreter prints the error and chooses the exit status, as for any script.
        sys.excepthook = _WithoutFrames(sys.excepthook)
        raise


class _WithoutFrames:
    """An excepthook that removes the launcher's frames from tracebacks."""

    def __init__(self, hook: Any) -> None:
        self._hook = hook

    def __call__(self, kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        seen: set[int] = set()
        waiting: list[BaseException | None] = [error]
        while waiting:
            one = waiting.pop()
            if one is not None and id(one) not in seen:
                seen.add(id(one))
                one.__traceback__ = without_frames(one.__traceback__)
                waiting += [one.__cause__, one.__context__, *getattr(one, "exceptions", ())]
        self._hook(kind, error, error.__traceback__)


def without_frames(traceback: TracebackType | None) -> TracebackType | None:
    """Return the traceback without the frames of the launcher."""
    entry = traceback
    while entry is not None:
        if entry.tb_frame.f_code is _run.__code__:
            traceback = entry.tb_next
        entry = entry.tb_next
    first: TracebackType | None = None
    last: TracebackType | None = None
    while traceback is not None:
        if not traceback.tb_frame.f_code.co_filename.startswith(_LAUNCHER):
            if last is None:
                first = traceback
            else:
                last.tb_next = traceback
            last = traceback
        traceback = traceback.tb_next
    if last is not None:
        last.tb_next = None
    return first
