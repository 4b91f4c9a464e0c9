"""Call sites of a script: keys that identify the call stack, made in about a microsecond."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import FrameType

import torch

Site = tuple[int, ...]

_DEPTH = 12
_TORCH = str(Path(torch.__file__).parent) + os.sep
_LAUNCHER = str(Path(__file__).parent) + os.sep
_is_inner: dict[str, bool] = {}


def _outside(frame: FrameType | None) -> FrameType | None:
    """The frame, or the first of its callers that is neither in PyTorch nor in this package."""
    while frame is not None:
        name = frame.f_code.co_filename
        inner = _is_inner.get(name)
        if inner is None:
            inner = _is_inner[name] = name.startswith((_TORCH, _LAUNCHER))
        if not inner:
            return frame
        frame = frame.f_back
    return None


def site() -> Site:
    """Return the code and the instruction of each caller outside of PyTorch and this package.

    A module with hooks is called through other frames of PyTorch than one without.
    """
    frame = _outside(sys._getframe(1))
    found: list[int] = []
    while frame is not None and len(found) < 2 * _DEPTH:
        found += [id(frame.f_code), frame.f_lasti]
        frame = _outside(frame.f_back)
    return tuple(found)


def place() -> str:
    """Return the file and line of the innermost of these callers."""
    frame = _outside(sys._getframe(1))
    return "?" if frame is None else f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"


def is_called_by_fastgan() -> bool:
    """Return whether the caller of the caller is fastgan itself, whose penalties are rerouted already."""
    frame = sys._getframe(2)
    name = frame.f_globals.get("__name__", "")
    return name == "fastgan" or (name.startswith("fastgan.") and not name.startswith("fastgan.launcher."))
