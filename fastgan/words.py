"""Words that several reports use."""

from __future__ import annotations


def number_of(count: int, noun: str) -> str:
    """Return a count with its noun: 1 thread, 2 threads."""
    return f"{count} {noun}{'' if count == 1 else 's'}"
