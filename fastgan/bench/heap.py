"""Controls what the allocator does with memory that a process frees."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # from glibc's malloc.h

KEPT, GIVEN_BACK = "kept", "given back"  # values in results


def keep_freed_memory() -> None:
    """Make this process keep the memory that it frees, if glibc's malloc is its allocator.

    By default glibc returns large blocks to the system, and the pages of each new tensor are mapped and zeroed again.
    On a CPU that can take longer than the convolution that fills them (docs/troubleshooting.md). With this setting, the
    process holds its peak memory until it ends.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_TRIM_THRESHOLD, -1)
        mallopt(_M_MMAP_MAX, 0)
