"""Set up `python -m fastgan`, also under torchrun, before PyTorch is imported. The package imports this first."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from types import TracebackType


def is_command(original: Sequence[str], arguments: Sequence[str]) -> bool:
    """Return whether `python -m fastgan` started this process.

    Args:
        original, arguments: sys.orig_argv and sys.argv. argv[0] is -m while the interpreter looks up the module.
    """
    return arguments[0] == "-m" and original[-len(arguments)] in ("fastgan", "-mfastgan")


def needs_no_kernels(arguments: Sequence[str]) -> bool:
    """Whether a command only prints a help text or the version."""
    if arguments[:1] == ["run"]:
        arguments = arguments[:2]  # what follows is the script's
    return not arguments or not {"-h", "--help", "--version"}.isdisjoint(arguments)


def show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print an error that nothing catches. Ctrl-C, during the seconds of importing PyTorch, is one line."""
    if issubclass(kind, KeyboardInterrupt):
        print("\nfastgan: interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


if sys.argv and is_command(sys.orig_argv, sys.argv):
    if needs_no_kernels(sys.argv[1:]):
        from fastgan.cli import main

        sys.exit(main())  # the rest of the package takes seconds
    if sys.argv[1:2] != ["run"]:  # a script of the user's
        # Idle OpenMP threads sleep. If they spin, a step takes many times as long while other programs use the cores.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        sys.excepthook = show
