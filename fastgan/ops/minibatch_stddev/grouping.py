"""The number of samples in a group."""

from __future__ import annotations


def size_of_groups(samples: int, group_size: int | None, remainder: str) -> int:
    size = samples if group_size is None else min(group_size, samples)
    if samples % size:
        if remainder == "error":
            raise ValueError(
                f"x must have a multiple of group_size samples, got N = {samples} and groups of {size};"
                ' remainder="largest-divisor" uses a smaller group size'
            )
        size = next(divisor for divisor in range(size, 0, -1) if samples % divisor == 0)
    return size
