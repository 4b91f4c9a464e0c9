"""Where a run computes, and what to write down about that place so that its numbers mean something."""

from __future__ import annotations

import ctypes
import platform
import sys
from typing import Any

import torch

from fastgan._version import __version__
from fastgan.bench.provenance import ROOT, commit_of, device_name

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def choose_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda was asked for, but PyTorch sees no CUDA device")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def keep_freed_memory() -> None:
    """Let this process keep what it frees, where glibc's malloc is its allocator.

    glibc gives large blocks back to the system, and each tensor's pages are mapped and zeroed anew, which on a CPU may
    take longer than the convolution that fills them (docs/recipes.md). What comes late stays resident until the end.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_TRIM_THRESHOLD, -1)
        mallopt(_M_MMAP_MAX, 0)


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
