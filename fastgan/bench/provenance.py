"""Describes where and how a result was measured, so that it can be judged and repeated."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from fastgan import backends
from fastgan._version import __version__

ROOT = Path(__file__).resolve().parents[2]
_VARIABLES = re.compile(
    r"(FASTGAN|OMP|KMP|GOMP|MKL|MALLOC|TRITON|TORCHINDUCTOR|PYTORCH|CUDA|NVIDIA_TF32)_\w+"
    r"|TORCH_ALLOW_TF32\w*|GLIBC_TUNABLES|LD_PRELOAD"
)
_FOLDERS = re.compile(r"[^\s:=]*/")  # the folder of a file does not affect its speed


def provenance(device: torch.device, command: str) -> dict[str, Any]:
    commit, dirty = commit_of(ROOT)
    about: dict[str, Any] = {
        "device": device_name(device),
        "device_type": device.type,
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "fastgan": __version__,
        "commit": commit,
        "dirty": dirty,
        "build": backends.build_info(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "system": platform.platform(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "environment": {
            name: _FOLDERS.sub("", value)
            for name, value in sorted(os.environ.items())
            if _VARIABLES.fullmatch(name) and value
        },
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        about |= {
            "driver": driver(),
            "cuda": torch.version.cuda,
            "capability": f"{properties.major}.{properties.minor}",
            "memory": properties.total_memory,
            "l2_cache": properties.L2_cache_size,
        }
    return about


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_name()}, {torch.backends.cpu.get_cpu_capability()}"  # a virtual machine's name tells too little


def cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    answer = _output(query)
    return answer.splitlines()[0].strip() if answer else None


def slug(device: torch.device) -> str:
    """Return the device as a folder name. A CPU's name includes the number of threads, which matters as much."""
    name = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    return name if device.type == "cuda" else f"{name}-{torch.get_num_threads()}-threads"


def commit_of(folder: Path) -> tuple[str | None, bool | None]:
    """Return the checkout's commit, and whether the timed code differs from it. None, None for an installed package."""
    git = ["git", "-C", str(folder)]
    if _output([*git, "ls-files", "--error-unmatch", "fastgan/backends.py"]) is None:
        return None, None
    commit = _output([*git, "rev-parse", "--short=12", "HEAD"])
    changes = _output([*git, "status", "--porcelain", "--", "fastgan", "csrc", "setup.py"])
    return (commit.strip(), bool(changes)) if commit else (None, None)


def _output(command: list[str]) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, check=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
