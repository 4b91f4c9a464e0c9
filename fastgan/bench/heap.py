"""What becomes of the memory that a process frees."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h

KEPT, GIVEN_BACK = "kept", "given back"  # as results call what became of it


def keep_freed_memory() -> None:
    """Let this process keep what it frees, where glibc's malloc is its allocator.

    glibc gives large blocks back to the system, and each tensor's pages are mapped and zeroed anew, which on a CPU may
    take longer than the convolution that fills them (docs/recipes.md). What comes late stays resident until the end.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_TRIM_THRESHOLD, -1)
        mallopt(_M_MMAP_MAX, 0)
