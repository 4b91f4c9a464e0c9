"""Pixels that took work to make, kept in files below the user's cache folder and memory-mapped from there."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.uint8]
Parts = Callable[[], Iterable[bytes]]  # what a file is made of, one part after another


def cache_folder() -> Path:
    """Below the user's cache folder; for a user without a home, in a folder of their own for temporary files."""
    if named := os.environ.get("XDG_CACHE_HOME"):
        return Path(named) / "fastgan"
    try:
        return Path.home() / ".cache" / "fastgan"
    except RuntimeError:
        return Path(tempfile.gettempdir()) / f"fastgan-{os.getuid() if hasattr(os, 'getuid') else 'cache'}"


def cache_path(name: str, *about: object) -> Path:
    """The file for what is made of `about`: where a source's name, size or time of change is other, so is the file."""
    key = hashlib.sha256(repr(about).encode()).hexdigest()[:16]
    return cache_folder() / "images" / f"{name}-{key}.bytes"


def stamp(source: Path) -> tuple[str, int, int]:
    """What tells a file from its later versions: where it is, its size and its time of change."""
    status = source.stat()
    return str(source.resolve()), status.st_size, status.st_mtime_ns


def kept(path: Path, parts: Parts) -> Pixels:
    """The bytes of a cache file (B,), which is written if it is not there."""
    return mapped(path) if os.path.exists(path) else written(path, parts)


def written(path: Path, parts: Parts) -> Pixels:
    """Write a cache file and map it; where it cannot be written, the bytes stay in memory."""
    try:
        return mapped(path) if write(path, parts()) else np.empty(0, np.uint8)
    except OSError:  # a full disk, a folder that may not be written to
        return np.frombuffer(bytearray(b"".join(parts())), np.uint8)


def write(path: Path, parts: Iterable[bytes]) -> int:
    """Write `path` whole or not at all, and not where it would be empty; how many bytes it has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.partial")  # other ranks may write the same file
    try:
        with open(unfinished, "wb") as file:
            size = sum(file.write(part) for part in parts)
            file.flush()
            os.fsync(file.fileno())
        if size:
            unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return size


def mapped(path: Path) -> Pixels:
    # Copy on write: PyTorch has no read-only tensors, and the file must not change.
    return np.memmap(path, np.uint8, "c")
