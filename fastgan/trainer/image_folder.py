"""Pictures of any size from a folder, cut square, resized once and kept as memory-mapped unsigned bytes."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps
from torch import Tensor

from fastgan.trainer.errors import DataError

ENDINGS = {".png", ".jpg", ".jpeg", ".webp"}
LARGEST = 100_000_000  # pixels; a small file may claim more than memory holds (a decompression bomb)
REPORTED = 5  # bad files that are named
UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError)  # what Pillow raises
CACHED_AS = 2  # how pictures become pixels; another number where that has changed, so that old caches are not read
Pixels = npt.NDArray[np.uint8]


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastgan"


def read_folder(folder: Path, size: int) -> tuple[Tensor, Tensor | None]:
    """Every picture below ``folder`` as (N, 3, size, size) uint8, and its sub-folder's number where there are several.

    Files that are no picture, or are cut short, or too large, are named on stderr and left out. The result is cached
    under the files' names, sizes and times of change.

    Raises:
        DataError: the folder cannot be read, or fewer than two pictures are left.
    """
    try:
        os.listdir(folder)  # rglob takes a folder that is not there, or may not be read, for an empty one
        files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in ENDINGS and path.is_file())
        stats = [(str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    except OSError as error:
        raise DataError(f"{folder} cannot be read: {error.strerror or error}") from error
    key = hashlib.sha256(repr((CACHED_AS, str(folder.resolve()), size, stats)).encode()).hexdigest()[:16]
    path = cache_folder() / "images" / f"{folder.resolve().name}-{size}-{key}.rgb"
    names = path.with_suffix(".json")  # the pictures that were good; written last
    if not names.exists():
        good = write_cache(path, size, ((name, partial(open_image, folder / name)) for name, _, _ in stats))
        if len(good) < 2:
            endings = ", ".join(sorted(ENDINGS))
            raise DataError(f"{folder} holds {len(good)} readable pictures ({endings}), wanted at least 2")
        names.write_text(json.dumps(good))
    return mapped(path, size), labels_of(json.loads(names.read_text()))


def mapped(path: Path, size: int) -> Tensor:
    """The (N, 3, size, size) of a cache file, on the disk's own pages."""
    # Copy on write: PyTorch has no read-only tensors, and the file must not change.
    return torch.from_numpy(np.memmap(path, np.uint8, "c").reshape(-1, 3, size, size))


def write_cache(path: Path, size: int, images: Iterable[tuple[str, Callable[[], Image.Image]]]) -> list[str]:
    """Write the pictures that open to ``path``, as one array of bytes (N, 3, size, size); the names of these."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".partial")
    good, bad = [], []
    try:
        with open(unfinished, "wb") as file:
            for name, opened in images:
                try:
                    pixels = square(opened(), size)
                except UNREADABLE as error:
                    bad.append(f"{name}: {error}")
                    continue
                file.write(pixels.tobytes())
                good.append(name)
        if good:
            unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    for line in bad[:REPORTED]:
        print(f"fastgan: left out {line}", file=sys.stderr)
    if len(bad) > REPORTED:
        print(f"fastgan: left out {len(bad) - REPORTED} more", file=sys.stderr)
    return good


def open_image(file: Path) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            image = Image.open(file)
        except Image.DecompressionBombWarning as warning:
            raise ValueError(str(warning)) from None
    if image.width * image.height > LARGEST:
        raise ValueError(f"{image.width} x {image.height} pixels are more than {LARGEST}")
    return image


def square(image: Image.Image, size: int) -> Pixels:
    """The middle square (3, size, size) of an image, upright; what is transparent becomes white."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits, which Pillow's conversion cuts off at 255
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
    """The number of each picture's first folder (N,), where every picture lies in one and there are several."""
    folders = [Path(name).parts[0] if len(Path(name).parts) > 1 else None for name in names]
    kinds = sorted({folder for folder in folders if folder is not None})
    if None in folders or len(kinds) < 2:
        return None
    return torch.tensor([kinds.index(folder) for folder in folders if folder is not None])
