"""Sizes of pictures: how they are written, and which ones networks can make."""

from __future__ import annotations

from collections.abc import Sequence

SMALLEST = 4  # shortest side, in pixels, where a generator starts and a discriminator ends
LEAST, MOST = 8, 1024  # of each side


def sides(image_size: int | str, networks: bool = True) -> tuple[int, int]:
    """Return the height and width of an image size: 128, "128" or "64x192" (height x width).

    Args:
        networks: whether networks make pictures of this size, so that not every size works.

    Raises:
        ValueError: the text is not of this form, or no network makes pictures of this size.
    """
    parts = str(image_size).lower().split("x")
    if len(parts) > 2 or not all(part.strip().isdecimal() for part in parts):
        raise ValueError(f"image_size must be a number or HEIGHTxWIDTH, such as 128 or 64x192, got {image_size!r}")
    height, width = int(parts[0]), int(parts[-1])
    problem = why_not((height, width)) if networks else "sides must be positive" if not height * width else None
    if problem:
        raise ValueError(f"image_size {image_size}: {problem}")
    return height, width


def levels(lengths: Sequence[int]) -> int:
    """Return how often networks halve sides of these lengths: until the shortest is from 4 to 7."""
    return max(min(lengths) // SMALLEST, 1).bit_length() - 1


def why_not(lengths: Sequence[int]) -> str | None:
    """Return why networks cannot make samples with these sides, and the next sizes that work, or None."""
    if min(lengths) < LEAST or max(lengths) > MOST:
        return f"sides must be from {LEAST} to {MOST}"
    step = 1 << levels(lengths)
    if all(length % step == 0 for length in lengths):
        return None
    below = tuple(max(LEAST, length // step * step) for length in lengths)
    above = tuple(min(MOST, -(-length // step) * step) for length in lengths)
    works = [written(size) for size in dict.fromkeys((below, above)) if why_not(size) is None]
    return f"each side must be a multiple of {step}, because the networks halve it {levels(lengths)} times; " + (
        f"the next sizes that work: {' and '.join(works)}" if works else "use a power of two"
    )


def written(lengths: Sequence[int]) -> str:
    """Write a size as the flag takes it: 128 for a square, 64x192 otherwise."""
    return str(lengths[0]) if len(set(lengths)) == 1 else "x".join(map(str, lengths))
