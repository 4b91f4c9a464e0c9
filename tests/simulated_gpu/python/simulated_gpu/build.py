"""Builds the library that simulates the devices. Once for each PyTorch and each state of its sources."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

SOURCES = Path(__file__).resolve().parents[2] / "csrc"


class CannotSimulate(RuntimeError):
    """This machine has no compiler, or its PyTorch isn't one to simulate a GPU for; the message says why."""


class BuildFailed(RuntimeError):
    """The compiler doesn't take the sources, which are written for the PyTorch of the Makefile."""


def library(build: bool = True) -> Path:
    """The path of the library, which is built first if need be.

    Raises:
        CannotSimulate: there is no compiler, PyTorch isn't a CPU build, or there's no library and ``build`` is false.
        BuildFailed: the compiler failed.
    """
    torch = _torch()
    path = _folder() / f"{_key()}.so"
    if path.exists():
        return path
    if not build:
        raise CannotSimulate(f"the library isn't built: run {sys.executable} -m simulated_gpu.build")
    _compile(torch, path)
    return path


def _torch() -> Path:
    """The folder of PyTorch. It isn't imported: the simulation has to be there before that."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise CannotSimulate("PyTorch isn't installed")
    folder = Path(spec.submodule_search_locations[0])
    if (folder / "lib" / "libtorch_cuda.so").exists() or (folder / "lib" / "libtorch_hip.so").exists():
        raise CannotSimulate("this PyTorch is built for GPUs; the simulation needs its CPU build")
    if not (folder / "lib" / "libtorch_cpu.so").exists():
        raise CannotSimulate(f"{folder} has no libtorch_cpu.so: the simulation runs on Linux, with the CPU wheel")
    return folder


def _compiler() -> str:
    compiler = os.environ.get("CXX") or "g++"
    found = shutil.which(compiler)
    if found is None:
        raise CannotSimulate(f"there is no C++ compiler {compiler!r}")
    return found


def _folder() -> Path:
    told = os.environ.get("SIMULATED_GPU_BUILD")
    return Path(told) if told else SOURCES.parents[2] / "build" / "simulated_gpu"


def _key() -> str:
    digest = hashlib.sha256(importlib.metadata.version("torch").encode())
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.read_bytes())
    return f"libsimulated_gpu-{digest.hexdigest()[:16]}"


def _compile(torch: Path, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}")
    headers = torch / "include"
    result = subprocess.run(
        [
            *(_compiler(), "-std=c++20", "-O1", "-fPIC", "-shared", "-Wall", "-Wno-unused-parameter"),
            *("-isystem", headers, "-isystem", headers / "torch/csrc/api/include", SOURCES / "library.cpp"),
            *("-o", unfinished, f"-L{torch / 'lib'}", "-Wl,--no-as-needed", "-ltorch_cpu", "-lc10"),
            f"-Wl,-rpath,{torch / 'lib'}",
        ],
        capture_output=True,
        text=True,
    )
    if result.returncode:
        raise BuildFailed(f"the compiler failed:\n{result.stderr[-4000:]}")
    unfinished.rename(path)


if __name__ == "__main__":
    try:
        print(library())
    except CannotSimulate as error:
        sys.exit(str(error))
