"""Gets between the imports of PyTorch and of Triton: the library is loaded before PyTorch's core looks for devices."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import sys
from collections.abc import Callable, Sequence
from types import ModuleType

from simulated_gpu import device, refusals
from simulated_gpu.build import library

_finders: list[_Finder] = []


def install() -> None:
    """Simulate the devices in this process.

    Raises:
        RuntimeError: PyTorch is imported already.
        CannotSimulate: the library isn't there and can't be built here.
    """
    if _finders:
        return
    if "torch" in sys.modules:
        raise RuntimeError("the simulated GPU has to be installed before PyTorch is imported")
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported
    device.path = library()
    refusals.hide()
    _finders.append(_Finder())
    sys.meta_path.insert(0, _finders[0])


def is_installed() -> bool:
    """Whether this process has simulated devices."""
    return bool(_finders)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name == "torch._C":
            device.load()  # its initialization asks for the hooks of CUDA
        elif name == "torch.cuda":
            from simulated_gpu import torch_cuda

            torch_cuda.fill(sys.modules["torch._C"])
        elif name == "triton.runtime.interpreter":
            from simulated_gpu import triton_interpreter

            return self._followed_by(name, path, triton_interpreter.patch)
        elif name in refusals.PATCHES:
            return self._followed_by(name, path, refusals.PATCHES[name])
        else:
            refusals.check_import(name)
        return None

    def _followed_by(
        self, name: str, path: Sequence[str] | None, patch: Callable[[ModuleType], None]
    ) -> importlib.machinery.ModuleSpec | None:
        """The module, which ``patch`` changes once it is there."""
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            patch(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
