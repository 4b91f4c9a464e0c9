"""Set environment variables for `python -m fastgan`, also under torchrun. Imported first, before PyTorch."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence


def is_command(original: Sequence[str], arguments: Sequence[str]) -> bool:
    """Whether `python -m fastgan` started this process, except for `run`, which starts the user's script.

    Args:
        original, arguments: sys.orig_argv and sys.argv. argv[0] is -m while the interpreter looks up the module.
    """
    module = original[-len(arguments)]
    return arguments[0] == "-m" and module in ("fastgan", "-mfastgan") and arguments[1:2] != ["run"]


if sys.argv and is_command(sys.orig_argv, sys.argv):
    # Idle OpenMP threads sleep. If they spin, a step takes many times as long while another program uses the cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
