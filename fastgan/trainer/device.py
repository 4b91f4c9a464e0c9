"""The device that a run computes on, and the environment that its records describe."""

from __future__ import annotations

import platform
from typing import Any

import torch

from fastgan._version import __version__
from fastgan.bench.provenance import ROOT, commit_of, device_name


def choose_device(name: str) -> torch.device:
    """Return the device called `name`; `auto` is CUDA if available."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is cuda, but PyTorch finds no CUDA device: use auto or cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def environment(device: torch.device) -> dict[str, Any]:
    commit, dirty = commit_of(ROOT)
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "fastgan": __version__,
        "commit": f"{commit}-dirty" if dirty else commit,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
