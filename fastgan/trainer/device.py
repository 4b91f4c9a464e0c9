"""Where a run computes, and what to write down about that place so that its numbers mean something."""

from __future__ import annotations

import platform
from typing import Any

import torch

from fastgan._version import __version__
from fastgan.bench.provenance import ROOT, commit_of, device_name


def choose_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda was asked for, but PyTorch sees no CUDA device")
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
