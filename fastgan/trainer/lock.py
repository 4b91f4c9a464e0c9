"""A lock on a run's folder, so that two processes never write to the same run.

The system releases the lock when its process ends, however it ends, so a killed process leaves no lock in the way. The
file says which process has it.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from pathlib import Path
from typing import Any

from fastgan.trainer.errors import RunFolderError

try:
    import fcntl
except ImportError:  # Windows: the lock only describes its process
    fcntl = None  # type: ignore[assignment]


class Lock:
    """A lock that is described by the file `path`. It is taken by `take` and given back by `release`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.descriptor: int | None = None

    def check(self) -> None:
        """Raise RunFolderError if another process has the lock."""
        if not self.path.exists():
            return
        descriptor = os.open(self.path, os.O_RDWR)
        try:
            self._lock(descriptor)
        finally:
            os.close(descriptor)  # this gives the lock back

    def take(self) -> None:
        """Take the lock.

        Raises:
            RunFolderError: another process has it.
        """
        while self.descriptor is None:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                self._lock(descriptor)
            except RunFolderError:
                os.close(descriptor)
                raise
            if self._is_current(descriptor):
                self.descriptor = descriptor
            else:  # its owner has removed the file in between
                os.close(descriptor)
        content = json.dumps({"pid": os.getpid(), "host": socket.gethostname()}) + "\n"
        os.truncate(self.descriptor, 0)
        os.write(self.descriptor, content.encode())

    def release(self) -> None:
        if self.descriptor is not None:
            with contextlib.suppress(OSError):
                self.path.unlink()
            os.close(self.descriptor)
            self.descriptor = None

    def _is_current(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.fstat(descriptor), os.stat(self.path))
        except FileNotFoundError:
            return False

    def _lock(self, descriptor: int) -> None:
        owner = self._owner()
        if owner.get("pid") == os.getpid() and owner.get("host") == socket.gethostname():
            return  # an earlier trainer of this process
        if fcntl is None:
            return
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            process = f"process {owner.get('pid', '?')} on {owner.get('host', 'an unknown host')}"
            raise RunFolderError(f"{self.path.parent} is in use by {process}: wait for it, or stop it first") from None
        except OSError:  # a file system without locks
            return

    def _owner(self) -> dict[str, Any]:
        try:
            found = json.loads(self.path.read_text())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}
