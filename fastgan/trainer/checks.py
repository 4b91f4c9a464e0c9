"""Checks that settings share. This module does not import PyTorch."""

from __future__ import annotations

import math

MOST_THREADS = 1024  # more can crash the OpenMP library


def require_positive(settings: object, *names: str) -> None:
    """Raise ValueError if one of these settings is not None and not a positive finite number."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and not 0 < value < math.inf:
            finite = " and finite" if value == math.inf else ""
            raise ValueError(f"{name} must be positive{finite}, got {value}")


def require_seed(seed: int) -> None:
    """Raise ValueError if PyTorch's generators cannot take numbers that are made from this seed."""
    if not 0 <= seed < 1 << 32:
        raise ValueError(f"seed must be from 0 to {(1 << 32) - 1}, got {seed}")


def require_threads(threads: int | None) -> None:
    """Raise ValueError if a number of threads is not None and out of range."""
    if threads is not None and not 1 <= threads <= MOST_THREADS:
        raise ValueError(f"threads must be from 1 to {MOST_THREADS}, got {threads}")
