"""Checkpoints. A checkpoint file is either complete or absent, and loading one runs no code."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from fastgan.trainer.errors import CheckpointError

KEEP = 2  # the newest one, and the one before it in case the newest is damaged


def save(folder: Path, step: int, state: dict[str, Any], keep_every: int | None = None) -> Path:
    """Write `state` as the checkpoint of `step`. An interrupted or failed write leaves older checkpoints unchanged.

    Older checkpoints are deleted, except for those of every `keep_every`-th step.

    Raises:
        CheckpointError: the disk is full, or the folder cannot be written to.
    """
    path = folder / f"step-{step:08d}.pt"
    partial = path.with_suffix(".partial")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            torch.save(state | {"step": step, "rng": _rng_state()}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        _sync_folder(folder)
    except (OSError, RuntimeError) as error:  # PyTorch reports a full disk as a RuntimeError
        # The partial file is useless, and it may occupy space that the user needs.
        _remove(partial)
        kept = [found.name for found in _checkpoints(folder)]
        advice = (
            f"{kept[-1]} is intact: free some space, then continue with --resume"
            if kept
            else ("it was the first one: free some space, then start again with --resume")
        )
        raise CheckpointError(
            f"the checkpoint of step {step} could not be written to {folder} ({_reason(error)}); {advice}"
        ) from error
    for old in _checkpoints(folder)[:-KEEP]:
        if keep_every is None or int(old.stem.partition("-")[2]) % keep_every:
            old.unlink()
    return path


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint and restore the state of PyTorch's global random generators.

    Raises:
        CheckpointError: the file is damaged or cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as file:
            if file.testzip() is not None:  # torch.load does not compare checksums
                raise CheckpointError(f"{path} is damaged (checksum)")
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        rng = state["rng"]
        state["step"] = int(state["step"])
    except CheckpointError:
        raise
    except (PermissionError, FileNotFoundError) as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except (OSError, RuntimeError, EOFError, KeyError, ValueError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{path} is damaged ({type(error).__name__})") from error
    _set_rng_state(rng)
    return state


def restore_rng(state: dict[str, Any]) -> None:
    """Restore PyTorch's global random generators from a loaded checkpoint again, after something else used them."""
    _set_rng_state(state["rng"])


def load_newest(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Return the newest intact checkpoint, and one message for each newer damaged one.

    Raises:
        CheckpointError: there is no checkpoint, or all are damaged.
    """
    damaged: list[str] = []
    for path in reversed(_checkpoints(folder)):
        try:
            state = load(path)
        except CheckpointError as error:  # noqa: PERF203
            damaged.append(str(error))
        else:
            return state, damaged
    raise CheckpointError("; ".join(damaged) or f"{folder} holds no checkpoint to resume from")


def found_in(folder: Path) -> bool:
    return bool(_checkpoints(folder))


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*.pt"))


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return  # report the original error instead


def _reason(error: OSError | RuntimeError) -> str:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return str(error).splitlines()[0]


def _rng_state() -> dict[str, Any]:
    # A CPU run must not initialize CUDA, which takes memory and makes forking impossible.
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def _set_rng_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if state["cuda"] and torch.cuda.device_count() == len(state["cuda"]):
        torch.cuda.set_rng_state_all(state["cuda"])


def _sync_folder(folder: Path) -> None:
    # A rename becomes durable when its folder is synced, not its file. Windows cannot open folders.
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
