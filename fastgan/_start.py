"""What `python -m fastgan` sets before PyTorch is imported; torchrun starts it so. The package imports this first."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence


def is_command(original: Sequence[str], arguments: Sequence[str]) -> bool:
    """Whether `python -m fastgan` started this process, except with `run`, which starts a script of the user's.

    Args:
        original, arguments: sys.orig_argv and sys.argv, in which -m stands while the interpreter looks up the module.
    """
    module = original[-len(arguments)]
    return arguments[0] == "-m" and module in ("fastgan", "-mfastgan") and arguments[1:2] != ["run"]


if sys.argv and is_command(sys.orig_argv, sys.argv):
    # Idle OpenMP threads sleep. If they spin, a step takes many times as long while another program uses the cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
