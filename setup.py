"""Builds the native modules with CMake and Ninja; everything else is in pyproject.toml.

FASTGAN_BUILD and FASTGAN_CUDA control `_native` and `_native_cuda`: auto (build if possible), require (fail if that is
impossible), off.  CXX, CUDACXX, CUDAARCHS, CMAKE_ARGS and MAX_JOBS are also used.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import ClassVar

from setuptools import Command, Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.errors import SetupError

ROOT = Path(__file__).resolve().parent
MODULES = {"cuda": "_native_cuda", "native": "_native"}  # in the order in which they are built


class CannotBuild(Exception):
    """A module cannot be built. The message explains why."""


def mode(variable: str) -> str:
    value = os.environ.get(variable) or "auto"
    if value not in ("auto", "require", "off"):
        raise SetupError(f"{variable} must be auto, require or off, got {value!r}")
    return value


def tool(name: str, bin_dir: str) -> str:
    """Return the path of cmake or ninja: from a wheel if installed, otherwise from PATH."""
    if importlib.util.find_spec(name):
        directory = getattr(__import__(name), bin_dir, None)
        found = directory and shutil.which(name, path=directory)
        if found:
            return str(found)
    found = shutil.which(name)
    if not found:
        raise CannotBuild(f"{name} was not found (pip install {name})")
    return found


def cxx_compiler() -> str:
    wanted = os.environ.get("CXX")
    if wanted:
        if not shutil.which(shlex.split(wanted)[0]):
            raise CannotBuild(f"no C++ compiler: CXX is {wanted}, which was not found")
        return wanted
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return name
    raise CannotBuild("no C++ compiler: none of c++, g++, clang++ is on PATH and CXX is not set")


def nvcc() -> str:
    wanted = os.environ.get("CUDACXX")
    if wanted:
        if not shutil.which(wanted):
            raise CannotBuild(f"no nvcc: CUDACXX is {wanted}, which was not found")
        return wanted
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    path = os.pathsep.join([os.path.join(home, "bin") for home in homes if home] + [os.environ.get("PATH", "")])
    found = shutil.which("nvcc", path=path)
    if not found:
        raise CannotBuild("no nvcc: not on PATH, in CUDA_HOME or in /usr/local/cuda, and CUDACXX is not set")
    return found


def jobs() -> int:
    for variable in ("CMAKE_BUILD_PARALLEL_LEVEL", "MAX_JOBS"):
        value = os.environ.get(variable)
        if value:
            if not value.isdigit() or int(value) < 1:
                raise SetupError(f"{variable} must be a positive integer, got {value!r}")
            return int(value)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def compile_module(name: str, directory: Path) -> dict[str, object]:
    """Configure and build one module in `directory`, and return CMake's description of it."""
    options = [f"-DFASTGAN_CPU={'ON' if name == 'native' else 'OFF'}"]
    if name == "cuda":
        options += ["-DFASTGAN_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={nvcc()}"]
    cxx_compiler()
    cmake, ninja = tool("cmake", "CMAKE_BIN_DIR"), tool("ninja", "BIN_DIR")
    try:
        import pybind11
    except ImportError:
        raise CannotBuild("pybind11 was not found (pip install pybind11)") from None

    configure = [cmake, "-S", str(ROOT / "csrc"), "-B", str(directory), "-G", "Ninja"]
    configure += [f"-DCMAKE_MAKE_PROGRAM={ninja}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
    configure += [f"-DPython_EXECUTABLE={sys.executable}", *options]
    configure += shlex.split(os.environ.get("CMAKE_ARGS", ""))
    for command in (configure, [cmake, "--build", str(directory), "--parallel", str(jobs())]):
        result = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        print(result.stdout, flush=True)
        if result.returncode:
            step = "configure" if command is configure else "build"
            raise CannotBuild(f"CMake's {step} step failed: {first_error(result.stdout)}")
    return dict(json.loads((directory / f"{name}.json").read_text()))


def first_error(log: str, lines: int = 4) -> str:
    """Return the log from its first error on, in one line."""
    said = [line.strip() for line in log.splitlines() if line.strip()]
    first = next((i for i, line in enumerate(said) if "error" in line.lower()), max(0, len(said) - lines))
    return " ".join(said[first : first + lines])


class BuildNative(Command):
    """Builds the modules that FASTGAN_BUILD and FASTGAN_CUDA select, and writes fastgan/_build_info.json."""

    description = "build the C++ and CUDA modules with CMake"
    user_options: ClassVar = [("inplace", "i", "put the modules into the source tree")]
    boolean_options: ClassVar = ["inplace"]

    def initialize_options(self) -> None:
        self.inplace = False
        self.editable_mode = False
        self.build_lib = None
        self.build_temp = None

    def finalize_options(self) -> None:
        self.set_undefined_options("build", ("build_lib", "build_lib"))
        self.build_temp = ROOT / "build" / f"cmake-{sysconfig.get_config_var('SOABI')}"

    def run(self) -> None:
        wanted = {"native": mode("FASTGAN_BUILD"), "cuda": mode("FASTGAN_CUDA")}
        if wanted["native"] == "off":
            if wanted["cuda"] == "require":
                raise SetupError("FASTGAN_CUDA=require contradicts FASTGAN_BUILD=off, which disables native modules")
            wanted["cuda"] = "off"
        if not self.in_source:
            # The wheel must not include a module that was deleted or renamed since the last build.
            shutil.rmtree(self.build_lib, ignore_errors=True)
        self.target.mkdir(parents=True, exist_ok=True)

        info: dict[str, object] = {"version": self.distribution.get_version()}
        for name, module in MODULES.items():
            info[name] = self.build_module(name, module, wanted[name])
        (self.target / "_build_info.json").write_text(json.dumps(info, indent=2) + "\n")

    def build_module(self, name: str, module: str, wanted: str) -> dict[str, object]:
        for stale in self.target.glob(f"{module}.*.so"):
            stale.unlink()
        variable = "FASTGAN_BUILD" if name == "native" else "FASTGAN_CUDA"
        if wanted == "off":
            off = "FASTGAN_CUDA" if os.environ.get("FASTGAN_CUDA") == "off" and name == "cuda" else "FASTGAN_BUILD"
            return {"built": False, "reason": f"built with {off}=off"}
        directory = self.build_temp / name
        try:
            about = compile_module(name, directory)
        except CannotBuild as error:
            if wanted == "require":
                raise SetupError(f"{variable}=require, but fastgan.{module} cannot be built: {error}") from None
            self.warn(f"fastgan.{module} is left out: {error}")
            self.warn(f"fastgan works without it; {variable}=require makes this an error")
            return {"built": False, "reason": str(error)}
        (built,) = directory.glob(f"{module}.*.so")
        shutil.copy2(built, self.target)
        self.distribution.native_modules.append(module)
        return {"built": True, "reason": "", **about}

    @property
    def in_source(self) -> bool:
        return bool(self.inplace or self.editable_mode)

    @property
    def target(self) -> Path:
        return (ROOT if self.in_source else Path(self.build_lib)) / "fastgan"

    def get_source_files(self) -> list[str]:
        return [str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc").rglob("*")) if path.is_file()]

    def get_outputs(self) -> list[str]:
        modules = [path for name in MODULES.values() for path in self.target.glob(f"{name}.*.so")]
        return [str(path) for path in [*modules, self.target / "_build_info.json"]]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class Build(build):
    # build_native must run first, because it empties build_lib.
    sub_commands: ClassVar = [("build_native", None), *build.sub_commands]


class BdistWheel(bdist_wheel):
    def run(self) -> None:
        # Whether the wheel is pure is known only after the build.
        self.run_command("build_native")
        self.root_is_pure = not self.distribution.has_ext_modules()
        super().run()


class FastganDistribution(Distribution):
    def __init__(self, attrs: dict[str, object] | None = None) -> None:
        self.native_modules: list[str] = []
        super().__init__(attrs)

    def has_ext_modules(self) -> bool:
        return bool(self.native_modules)


setup(
    distclass=FastganDistribution,
    cmdclass={"build": Build, "build_native": BuildNative, "bdist_wheel": BdistWheel},
)
