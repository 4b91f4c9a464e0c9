"""The command `fastgan`. It is outside the package so that Ctrl-C works during the seconds of importing PyTorch."""

import os
import sys
import warnings
from importlib.util import find_spec
from types import ModuleType


def main() -> int:
    if sys.argv[1:2] == ["run"] and not needs_no_kernels(sys.argv[1:3]):
        # The interpreter reports the script's own errors and Ctrl-C.
        from fastgan.launcher.command import main as run_script

        return run_script(sys.argv[2:])
    # Idle OpenMP threads sleep. If they spin, a step takes many times as long while another program uses the cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # PyTorch warns if NumPy is missing. Only commands that read data need NumPy, and they report it themselves.
    warnings.filterwarnings("ignore", "Failed to initialize NumPy", UserWarning)
    try:
        if needs_no_kernels(sys.argv[1:]):
            skip_package()
        from fastgan.cli import main as run

        return run()
    except KeyboardInterrupt:
        print("\nfastgan: interrupted", file=sys.stderr)
        return 130


def needs_no_kernels(arguments: list[str]) -> bool:
    """Whether the command only prints a help text or the version."""
    return not arguments or bool({"-h", "--help", "--version"}.intersection(arguments))


def skip_package() -> None:
    """Make modules of the package importable without the package's own imports, which take seconds."""
    spec = find_spec("fastgan")
    if spec is not None and spec.submodule_search_locations is not None and "fastgan" not in sys.modules:
        package = ModuleType("fastgan")
        package.__path__ = list(spec.submodule_search_locations)
        sys.modules["fastgan"] = package
