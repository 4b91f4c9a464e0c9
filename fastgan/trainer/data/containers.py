"""Folders and zip files of pictures: their entries, and which of these are pictures."""

from __future__ import annotations

import os
import stat
import zipfile
from abc import ABC, abstractmethod
from collections import Counter
from pathlib import Path, PurePath, PurePosixPath
from typing import NamedTuple

from fastgan.trainer.errors import DataError, reason

NOT_DATA = {"__MACOSX", "@eaDir", "$RECYCLE.BIN", "lost+found"}  # folders that systems leave beside pictures


class Entry(NamedTuple):
    name: str  # path in the container, with slashes
    size: int  # bytes
    version: int  # modification time of a file; checksum of a member of a zip file


class Container(ABC):
    """A folder or a zip file. Hidden files and folders, and those that systems leave behind, are not in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lost: list[str] = []  # entries that cannot be read, such as a broken link, each with the reason
        entries = [entry for entry in self.find() if counts(entry.name)]
        self.entries = sorted(entries, key=lambda entry: PurePosixPath(entry.name).parts)

    @abstractmethod
    def find(self) -> list[Entry]: ...

    @abstractmethod
    def read(self, name: str) -> bytes: ...

    def endings(self) -> Counter[str]:
        return Counter(PurePosixPath(entry.name).suffix.lower() for entry in self.entries)


def counts(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return not any(part.startswith(".") or part in NOT_DATA for part in parts)


class Folder(Container):
    """Links to folders are followed, and each folder is visited once. Links to a parent of the folder are not."""

    def find(self) -> list[Entry]:
        root = os.path.realpath(self.path)
        visited = {root, *map(str, PurePath(root).parents)}
        waiting, links = [self.path], list[Path]()
        found: list[Entry] = []
        while waiting or links:
            if waiting:
                folder = waiting.pop()
            else:  # links come last, so that a folder is found under its own name
                folder = links.pop(0)
                if os.path.realpath(folder) in visited:
                    continue
                visited.add(os.path.realpath(folder))
            for item in self._read_or_raise(folder):
                if not counts(item.name):
                    continue
                name = Path(item.path).relative_to(self.path).as_posix()
                try:
                    status = item.stat()
                except OSError as error:
                    what = "the link leads nowhere" if isinstance(error, FileNotFoundError) else reason(error)
                    self.lost.append(f"{name}: {what}")
                    continue
                if stat.S_ISREG(status.st_mode):
                    found.append(Entry(name, status.st_size, status.st_mtime_ns))
                elif stat.S_ISDIR(status.st_mode):
                    if item.is_symlink():
                        links.append(Path(item.path))
                    elif os.path.realpath(item.path) not in visited:  # a link may have led here before
                        visited.add(os.path.realpath(item.path))
                        waiting.append(Path(item.path))
        return found

    def _read_or_raise(self, folder: Path) -> list[os.DirEntry[str]]:
        try:
            with os.scandir(folder) as items:
                return sorted(items, key=lambda item: item.name)
        except OSError as error:
            raise DataError(f"{folder} cannot be read: {reason(error)}") from error

    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()


class Zip(Container):
    def find(self) -> list[Entry]:
        try:
            self.file = zipfile.ZipFile(self.path)
        except (OSError, zipfile.BadZipFile) as error:
            if isinstance(error, zipfile.BadZipFile) and self.path.suffix.lower() != ".zip":
                raise DataError(f"{self.path} must be a folder or a zip file of pictures, and is neither") from error
            raise DataError(f"{self.path} cannot be read as a zip file: {reason(error)}") from error
        members = [member for member in self.file.infolist() if not member.is_dir()]
        self.members = {member.filename.replace("\\", "/"): member for member in members}  # as some Windows tools write
        return [Entry(name, member.file_size, member.CRC) for name, member in self.members.items()]

    def read(self, name: str) -> bytes:
        member = self.members[name]
        if member.flag_bits & 1:
            raise ValueError("it is encrypted, unpack the zip file first")
        return self.file.read(member)


def open_container(path: Path) -> Container:
    """Open a folder or a zip file.

    Raises:
        DataError: it does not exist, or cannot be read.
    """
    if path.is_file():
        return Zip(path)
    return Folder(path)
