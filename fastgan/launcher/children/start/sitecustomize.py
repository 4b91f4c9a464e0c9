"""Runs at the start of every Python process below ``fastgan run``. It starts the launcher after PyTorch's import."""

import contextlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from typing import Any

_HERE = os.path.dirname(os.path.abspath(__file__))


def _run_hidden_sitecustomize() -> None:
    """Run the sitecustomize.py that this file hides, if there is one."""
    elsewhere = [folder for folder in sys.path if os.path.abspath(folder or ".") != _HERE]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", elsewhere)
    if spec is not None and spec.loader is not None:
        module = importlib.util.module_from_spec(spec)
        sys.modules["sitecustomize"] = module
        spec.loader.exec_module(module)


class _AfterImports(importlib.abc.MetaPathFinder):
    """Find PyTorch and fastgan with the other finders, and start the launcher when both are imported.

    fastgan imports PyTorch. If a script imports fastgan first, the launcher waits for the rest of fastgan.
    """

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name not in ("torch", "fastgan"):
            return None
        found = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: Any) -> None:
                run(module)
                (self._after_torch if name == "torch" else self._after_fastgan)()

            vars(spec.loader)["exec_module"] = exec_module
        return spec

    def _after_torch(self) -> None:
        if "fastgan" not in sys.modules:
            with contextlib.suppress(ImportError):  # an interpreter without fastgan
                importlib.import_module("fastgan")

    def _after_fastgan(self) -> None:
        from fastgan.launcher.children import begin

        sys.meta_path[:] = [finder for finder in sys.meta_path if finder is not self]
        begin()


if os.environ.get("FASTGAN_RUN") and os.environ.get("FASTGAN", "").lower() != "off":
    sys.meta_path.insert(0, _AfterImports())
_run_hidden_sitecustomize()
