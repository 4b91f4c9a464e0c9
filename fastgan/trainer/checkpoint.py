"""Checkpoints: a file is either whole or absent, and loading one runs no code."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from fastgan.trainer.errors import CheckpointError

KEEP = 2  # the newest, and the one before it should the newest be damaged


def save(folder: Path, step: int, state: dict[str, Any]) -> Path:
    """Write `state` as the checkpoint of `step`; an interrupted write leaves the older ones as they were."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:08d}.pt"
    partial = path.with_suffix(".partial")
    with open(partial, "wb") as file:
        torch.save(state | {"step": step, "rng": _rng_state()}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    _sync_folder(folder)
    for old in _checkpoints(folder)[:-KEEP]:
        old.unlink()
    return path


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint, and set PyTorch's global generators as they were when it was written."""
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        rng = state.pop("rng")
        state["step"] = int(state["step"])
    except (OSError, RuntimeError, EOFError, KeyError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise CheckpointError(
            f"{path} is damaged ({type(error).__name__}); delete it to resume from the one before it"
        ) from error
    _set_rng_state(rng)
    return state


def newest(folder: Path) -> Path:
    """The checkpoint of the latest step."""
    checkpoints = _checkpoints(folder)
    if not checkpoints:
        raise CheckpointError(f"{folder} holds no checkpoint to resume from")
    return checkpoints[-1]


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*.pt"))


def _rng_state() -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def _set_rng_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if state["cuda"] and torch.cuda.device_count() == len(state["cuda"]):
        torch.cuda.set_rng_state_all(state["cuda"])


def _sync_folder(folder: Path) -> None:
    # A rename reaches the disk with its folder, not with its file. Windows cannot open folders.
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
