"""The folder of a run: runs/<name>/ with its configuration, metrics, pictures, report and checkpoints."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from fastgan import strict_json
from fastgan.trainer.config import TrainConfig, refuse_changes
from fastgan.trainer.data.drawn import Source
from fastgan.trainer.data.held_out import hold_out
from fastgan.trainer.data.record import DataRecord, record_of
from fastgan.trainer.data.sources import load_source
from fastgan.trainer.errors import RunFolderError
from fastgan.trainer.lock import Lock

PARTIAL = ".partial"  # the ending of files that are being written
MEASURING = 1 << 32  # added to a seed for measurements, so that they never share a stream with training


def run_data(config: TrainConfig, folder: Path, device: torch.device) -> tuple[Source, Source | None]:
    """Return the samples that the run in `folder` trains on, and those that it holds out, or None."""
    seed = 4 * config.seed
    source = load_source(config.dataset, seed + 2, device, config.data, config.image_size, config.pictures)
    known = DataRecord.read(folder / "data.json")
    now = record_of(source)
    same = known is None or now is None or known.digest == now.digest
    names = () if known is None or same else known.held_out
    return source, hold_out(source, config.optim.batch_size, seed + MEASURING, names)


class RunFolder:
    """The paths in runs/<name>/. Nothing is written before `open`, so a run that cannot start leaves no trace.

    Raises:
        RunFolderError: the folder is in use, or cannot be resumed with these settings.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.path = config.folder
        self.config = self.path / "config.json"
        self.data = self.path / "data.json"
        self.metrics = self.path / "metrics.jsonl"
        self.samples = self.path / "samples.png"
        self.history = self.path / "samples"
        self.losses = self.path / "losses.png"
        self.interpolations = self.path / "interpolations.png"
        self.best = self.path / "best.safetensors"  # written with --score-every
        self.nearest = self.path / "nearest.png"
        self.quality = self.path / "quality.json"
        self.report = self.path / "report.md"
        self.html = self.path / "report.html"
        self.checkpoints = self.path / "checkpoints"
        self.tensorboard = self.path / "tensorboard"
        self.verify = self.path / "verify.json"  # written by `fastgan verify --out`
        self.lock = Lock(self.path / "lock")
        self.fresh = not config.resume
        self.opened = False  # this run writes to the folder
        self.created: list[Path] = []  # folders that this run made, the innermost first

        self.lock.check()
        self.saved: TrainConfig | None = None  # the settings of the run to resume
        if config.resume:
            self.saved = TrainConfig.load(self.config)
            refuse_changes(self.saved, config)
        elif not config.overwrite:
            self._require_unused()

    def _require_unused(self) -> None:
        """Raise RunFolderError if the folder cannot be read, or has files that no new run may meet."""
        try:
            entries = list(self.path.iterdir()) if self.path.exists() else []
        except PermissionError as error:
            raise RunFolderError(f"{self.path} cannot be read: {error.strerror}") from error
        if self.config in entries:
            raise RunFolderError(f"{self.path} already exists: --resume continues the run, --overwrite replaces it")
        if any(entry not in (self.verify, self.lock.path) and entry.suffix != PARTIAL for entry in entries):
            raise RunFolderError(
                f"{self.path} has files but no run: choose another --name, or --overwrite, which keeps other files"
            )

    def open(self, config: TrainConfig, data: DataRecord | None = None) -> None:
        """Take the lock, and write what is known at the start.

        Raises:
            RunFolderError: another process has the lock, or has written to the folder since this run looked.
        """
        self.created = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        make_folder(self.path)
        self.lock.take()
        if not (config.resume or config.overwrite):
            self._require_unused()
        self.opened = True
        if config.overwrite:
            self._clear()
        for partial in (*self.path.glob(f"*{PARTIAL}"), *self.checkpoints.glob(f"*{PARTIAL}")):
            partial.unlink(missing_ok=True)  # a process was killed while it wrote
        if data is not None:
            replace_text(self.data, data.text())
        class_names = {"class_names": data.class_names} if data is not None and data.class_names else {}
        replace_text(self.config, strict_json.dumps(config.to_json() | class_names, indent=2) + "\n")
        self.history.mkdir(exist_ok=True)

    def undo(self) -> None:
        """Remove the files of a failed start, unless they are another run's, and release the lock."""
        if self.fresh and self.opened:
            self._clear()
        self.lock.release()
        for folder in self.created:
            with contextlib.suppress(OSError):  # it contains something else
                folder.rmdir()

    def _clear(self) -> None:
        """Delete the files that a run writes, and no other files in the folder."""
        for file in self._files():
            file.unlink(missing_ok=True)
        for folder in (self.history, self.checkpoints, self.tensorboard):
            shutil.rmtree(folder, ignore_errors=True)

    def _files(self) -> tuple[Path, ...]:
        pictures = self.samples, self.losses, self.interpolations, self.nearest
        return *pictures, self.config, self.data, self.best, self.metrics, self.quality, self.report, self.html

    def append_metrics(self, record: dict[str, Any]) -> None:
        try:
            with open(self.metrics, "a") as file:
                file.write(strict_json.dumps(record) + "\n")
        except OSError as error:  # without the name of the file if the disk is full
            raise OSError(error.errno, error.strerror, str(self.metrics)) from error

    def read_metrics(self) -> list[dict[str, Any]]:
        """Return the records. A last line that a crash cut short is left out.

        Raises:
            RunFolderError: another line is damaged.
        """
        if not self.metrics.exists():
            return []
        *lines, _ = self.metrics.read_text(encoding="utf-8", errors="replace").split("\n")
        return [self._record(number, line) for number, line in enumerate(lines, 1)]

    def _record(self, number: int, line: str) -> dict[str, Any]:
        try:
            record = strict_json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict):
            raise RunFolderError(f"{self.metrics}, line {number} is no record in JSON: remove this line")
        return record

    def forget_after(self, step: int) -> None:
        """Remove the metrics of steps that a resumed run repeats."""
        records = [record for record in self.read_metrics() if record.get("step", 0) <= step]
        replace_text(self.metrics, "".join(strict_json.dumps(record) + "\n" for record in records))


def require_writable(path: Path) -> None:
    """Check that a folder can be made and written to, without making it, before a long computation.

    Raises:
        RunFolderError: it cannot.
    """
    there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        raise RunFolderError(f"{path} cannot be written to: {error.strerror}") from error


def make_folder(path: Path) -> None:
    """Create a folder and check that it is writable, so that a run fails at its start and not at its end.

    Raises:
        RunFolderError: the folder cannot be created or written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise RunFolderError(f"{path} cannot be written to: {error.strerror}") from error


def replace_text(path: Path, text: str) -> None:
    """Write `path` atomically: after a full disk or a kill, the previous content is still there."""
    partial = path.with_name(path.name + PARTIAL)
    with removed_if_cut_short(partial, path):
        with open(partial, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)


@contextlib.contextmanager
def removed_if_cut_short(path: Path, named: Path | None = None) -> Iterator[None]:
    """Remove a file that could not be written as a whole, and name it, or another one, in the system's error."""
    try:
        yield
    except BaseException as error:  # also Ctrl-C
        with contextlib.suppress(OSError):  # it is a folder, or was never made
            path.unlink()
        if isinstance(error, OSError) and error.strerror:
            raise OSError(error.errno, error.strerror, str(named or path)) from error
        raise
