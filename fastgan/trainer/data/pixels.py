"""From a file to pixels: any picture that Pillow reads, upright, cropped, resized, in one to four channels."""

from __future__ import annotations

import io
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageColor, ImageOps, UnidentifiedImageError

from fastgan.trainer.data.cache import Pixels
from fastgan.trainer.data.options import Channels, Crop

MODES: dict[int, str] = {1: "L", 3: "RGB", 4: "RGBA"}
NEEDS_OTHER_PROGRAMS = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}  # formats that Pillow only recognizes
LARGEST = 100_000_000  # pixels; a small file can declare an image that exceeds memory (a decompression bomb)
MARGIN = 8  # random crops are cut from pictures whose sides are larger by an eighth
UNREADABLE = (  # errors that Pillow and zipfile raise
    *(OSError, ValueError, SyntaxError, EOFError, RuntimeError, Image.DecompressionBombError),
    *(zipfile.BadZipFile, zlib.error, NotImplementedError, Image.DecompressionBombWarning),
)


@dataclass(frozen=True)
class Layout:
    """The size and channels to which every picture is converted."""

    height: int
    width: int
    crop: Crop = "center"
    channels: Channels = 3
    background: str = "white"  # color under transparent pixels, unless the alpha channel is kept

    def __post_init__(self) -> None:
        try:
            ImageColor.getrgb(self.background)
        except ValueError:
            raise ValueError(
                f"background must be a color, such as white or '#80ff00', got {self.background!r}"
            ) from None

    @property
    def stored(self) -> tuple[int, int]:
        """Height and width in the cache. Random crops leave a margin that is cut off as pictures are drawn."""
        if self.crop != "random":
            return self.height, self.width
        return self.height + max(1, self.height // MARGIN), self.width + max(1, self.width // MARGIN)


@cache
def endings() -> frozenset[str]:
    """Return the endings of the files that Pillow reads, in lower case, with their dot."""
    found = Image.registered_extensions()
    return frozenset(end for end, kind in found.items() if kind in Image.OPEN and kind not in NEEDS_OTHER_PROGRAMS)


def open_image(file: Path | bytes) -> Image.Image:
    """Open a picture from a path or from a file's content. An animation is opened at its first frame.

    Raises:
        One of UNREADABLE: the file is not a picture, or too large.
    """
    try:
        image = Image.open(io.BytesIO(file) if isinstance(file, bytes) else file)
    except UnidentifiedImageError:
        raise ValueError("Pillow does not recognize it as a picture") from None
    if image.width * image.height > LARGEST:
        raise ValueError(f"{image.width} x {image.height} pixels exceed the limit of {LARGEST}")
    return image


@contextmanager
def large_pictures_refused() -> Iterator[None]:
    """Turn Pillow's warning of large pictures into an error, in all threads."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def pixels_of(image: Image.Image, layout: Layout) -> Pixels:
    """Return the pixels (channels, height, width) of an image, upright.

    A crop keeps the largest rectangle of the layout's proportions in the middle; without one the proportions change.
    """
    image = in_mode(eight_bits(ImageOps.exif_transpose(image)), layout)
    height, width = layout.stored
    box: tuple[float, float, float, float] | None = None
    if layout.crop != "none":
        scale = min(image.width / width, image.height / height)
        across, down = scale * width, scale * height
        if height == width:
            across = down = min(image.size)
        left, top = (image.width - across) / 2, (image.height - down) / 2
        if height == width:
            left, top = left // 1, top // 1
        box = (max(left, 0), max(top, 0), min(left + across, image.width), min(top + down, image.height))  # rounding
    resized = np.asarray(image.resize((width, height), Image.Resampling.LANCZOS, box))  # (H, W) or (H, W, C)
    return np.ascontiguousarray(resized.reshape(height, width, layout.channels).transpose(2, 0, 1))


def eight_bits(image: Image.Image) -> Image.Image:
    """Scale pixels of 16 bits and floating-point pixels to 8 bits; Pillow's own conversion clips at 255."""
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    if image.mode == "F":
        values = np.nan_to_num(np.asarray(image))
        scale = 255 if values.max() <= 1 else 1
        return Image.fromarray((values * scale).round().clip(0, 255).astype(np.uint8))
    return image


def in_mode(image: Image.Image, layout: Layout) -> Image.Image:
    """Convert to gray, RGB or RGBA. Transparent parts take the background's color, unless alpha is kept."""
    if layout.channels == 4:
        return image.convert("RGBA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, layout.background), image)
    elif image.mode == "L" and layout.channels == 1:
        return image
    return image.convert("RGB").convert(MODES[layout.channels])
