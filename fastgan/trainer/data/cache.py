"""A cache of decoded pixels: files in the user's cache folder, read through memory maps."""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fastgan.trainer.errors import reason

Pixels = npt.NDArray[np.uint8]
Parts = Callable[[], Iterable[bytes]]  # the content of a file, in consecutive parts


def cache_folder() -> Path:
    """Return fastgan's folder in the user's cache folder, or a temporary folder if the user has no home folder."""
    if named := os.environ.get("XDG_CACHE_HOME"):
        return Path(named) / "fastgan"
    try:
        return Path.home() / ".cache" / "fastgan"
    except RuntimeError:
        return Path(tempfile.gettempdir()) / f"fastgan-{os.getuid() if hasattr(os, 'getuid') else 'cache'}"


def cache_path(name: str, *about: object) -> Path:
    """Return the cache file for data made from `about`. A source with a new name, size or mtime gets a new file."""
    key = hashlib.sha256(repr(about).encode()).hexdigest()[:16]
    return cache_folder() / "images" / f"{name}-{key}.bytes"


def stamp(source: Path) -> tuple[str, int, int]:
    """Identify a version of a file by its path, size and modification time."""
    status = source.stat()
    return str(source.resolve()), status.st_size, status.st_mtime_ns


def kept(path: Path, parts: Parts) -> Pixels:
    """Return the bytes of a cache file (B,); write the file first if it does not exist."""
    return mapped(path) if os.path.exists(path) else written(path, parts)


def written(path: Path, parts: Parts) -> Pixels:
    """Write a cache file and map it. If it cannot be written, keep the bytes in memory."""
    try:
        return mapped(path) if write(path, parts()) else np.empty(0, np.uint8)
    except OSError as error:  # for example a full disk or a read-only folder
        print(f"fastgan: no cache, {path.parent} cannot be written to: {reason(error)}", file=sys.stderr)
        return np.frombuffer(bytearray(b"".join(parts())), np.uint8)


def write(path: Path, parts: Iterable[bytes]) -> int:
    """Write `path` atomically, unless it would be empty. Return its size in bytes."""
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
    # Use copy-on-write: PyTorch has no read-only tensors, and the file must not change.
    return np.memmap(path, np.uint8, "c")
