"""The file that the workers of a study share."""

from __future__ import annotations

import os
from pathlib import Path

from optuna.storages.journal import JournalFileBackend

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


class SystemLock:
    """A lock that the system releases when its process ends. optuna's own lock of a killed worker lasts 30 seconds."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.descriptor: int | None = None

    def acquire(self) -> bool:
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except BaseException:
            os.close(descriptor)
            raise
        self.descriptor = descriptor
        return True

    def release(self) -> None:
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None


def remove_partial_line(path: Path) -> None:
    """Remove the end of a line that a full disk or a kill cut short. The next line would be appended to it."""
    if path.exists():
        with open(path, "r+b") as file:
            content = file.read()
            if content.startswith(b"{"):  # otherwise it is no journal
                file.truncate(content.rfind(b"\n") + 1)


def open_journal(path: Path) -> JournalFileBackend:
    """Open a journal, or create it. A file system without locks, and Windows, get optuna's lock."""
    lock = SystemLock(path.with_suffix(".lock"))
    try:
        if fcntl is not None and lock.acquire():
            remove_partial_line(path)
            lock.release()
            return JournalFileBackend(str(path), lock)  # type: ignore[arg-type]
    except OSError:
        pass
    return JournalFileBackend(str(path))
