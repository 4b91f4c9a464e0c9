"""Runs at the start of every Python process below ``fastgan run``. It starts the launcher after PyTorch's import."""

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


class _AfterTorchImport(importlib.abc.MetaPathFinder):
    """Find PyTorch with the other finders, and start the launcher after its import."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: Any) -> None:
                run(module)
                try:
                    from fastgan.launcher.children import begin
                except ImportError:
                    return  # an interpreter without fastgan
                begin()

            vars(spec.loader)["exec_module"] = exec_module
        return spec


if os.environ.get("FASTGAN_RUN") and os.environ.get("FASTGAN", "").lower() != "off":
    sys.meta_path.insert(0, _AfterTorchImport())
_run_hidden_sitecustomize()
