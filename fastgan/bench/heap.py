"""What becomes of the memory that a process frees."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h

KEPT, GIVEN_BACK = "kept", "given back"  # as results call what became of it


def keep_freed_memory() -> None:
    """Let this process keep what it frees, where glibc's malloc is its allocator.

    glibc returns large blocks to the system, and the pages of each new tensor are mapped and zeroed again. On a CPU
    that may take longer than the convolution that fills them (docs/troubleshooting.md). The process holds its peak
    memory until it ends.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_TRIM_THRESHOLD, -1)
        mallopt(_M_MMAP_MAX, 0)
