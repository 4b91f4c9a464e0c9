"""Images of any size from a folder, cropped to squares, resized once and cached as memory-mapped bytes."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from fastgan.trainer.data.cache import Pixels, cache_path, mapped, write, written
from fastgan.trainer.errors import DataError

ENDINGS = {".png", ".jpg", ".jpeg", ".webp"}
LARGEST = 100_000_000  # pixels; a small file can declare an image that exceeds memory (a decompression bomb)
REPORTED = 5  # bad files to report by name
UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError)  # errors that Pillow raises


def read_folder(folder: Path, size: int) -> tuple[Tensor, Tensor | None]:
    """Read every image in ``folder`` as (N, 3, size, size) uint8, with labels if there are several subfolders.

    Files that are not images, are truncated or too large are reported on stderr and skipped. The result is cached; the
    cache key covers the files' names, sizes and modification times.

    Raises:
        DataError: the folder cannot be read, or contains fewer than two readable images.
    """
    try:
        os.listdir(folder)  # rglob treats a missing or unreadable folder as empty
        files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in ENDINGS and path.is_file())
        stats = [(str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    except OSError as error:
        raise DataError(f"{folder} cannot be read: {error.strerror or error}") from error
    path = cache_path(f"{folder.resolve().name}-{size}", str(folder.resolve()), stats)
    names = path.with_suffix(".json")  # names of the readable images; written last
    if os.path.exists(names) and os.path.exists(path):
        return as_images(mapped(path), size), labels_of(json.loads(names.read_text()))
    images, good = squares(path, size, [(name, partial(open_image, folder / name)) for name, _, _ in stats])
    if len(good) < 2:
        endings = ", ".join(sorted(ENDINGS))
        raise DataError(f"{folder} contains {len(good)} readable images ({endings}), but at least 2 are needed")
    with contextlib.suppress(OSError):  # without this file the next run reads the images again
        write(names, [json.dumps(good).encode()])
    return images, labels_of(good)


def as_images(pixels: Pixels, size: int) -> Tensor:
    return torch.from_numpy(pixels).view(-1, 3, size, size)


def squares(path: Path, size: int, images: Sequence[tuple[str, Callable[[], Image.Image]]]) -> tuple[Tensor, list[str]]:
    """Return the readable images (N, 3, size, size), stored in the cache file `path`, and their names."""
    good: list[str] = []
    bad: list[str] = []

    def parts() -> Iterator[bytes]:
        good.clear()
        bad.clear()
        for name, opened in images:
            try:
                pixels = square(opened(), size)
            except UNREADABLE as error:
                bad.append(f"{name}: {error}")
                continue
            good.append(name)
            yield pixels.tobytes()

    found = as_images(written(path, parts), size)
    for line in bad[:REPORTED]:
        print(f"fastgan: skipped {line}", file=sys.stderr)
    if len(bad) > REPORTED:
        print(f"fastgan: skipped {len(bad) - REPORTED} more", file=sys.stderr)
    return found, good


def open_image(file: Path) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            image = Image.open(file)
        except Image.DecompressionBombWarning as warning:
            raise ValueError(str(warning)) from None
    if image.width * image.height > LARGEST:
        raise ValueError(f"{image.width} x {image.height} pixels exceed the limit of {LARGEST}")
    return image


def square(image: Image.Image, size: int) -> Pixels:
    """Crop the central square (3, size, size) of an image, upright. Transparent parts become white."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits; Pillow's own conversion clips at 255
        image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(ground, image)
    image = image.convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    box = (left, top, left + side, top + side)
    pixels = np.asarray(image.resize((size, size), Image.Resampling.LANCZOS, box))  # (size, size, 3)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def labels_of(names: list[str]) -> Tensor | None:
    """Return the index of each image's top folder (N,), if every image is in one and there are several."""
    folders = [Path(name).parts[0] if len(Path(name).parts) > 1 else None for name in names]
    kinds = sorted({folder for folder in folders if folder is not None})
    if None in folders or len(kinds) < 2:
        return None
    return torch.tensor([kinds.index(folder) for folder in folders if folder is not None], device="cpu")
