"""Noto color emoji: about 3,800 small pictures from the font in Debian's package fonts-noto-color-emoji."""

from __future__ import annotations

import io
from functools import partial
from pathlib import Path

from PIL import Image
from torch import Tensor

from fastgan.trainer.data.cache import cache_folder, cache_path, stamp
from fastgan.trainer.data.image_folder import Pictures, is_kept, kept_pictures
from fastgan.trainer.data.options import Channels
from fastgan.trainer.data.pixels import Layout
from fastgan.trainer.errors import DataError, reason

FONT = "NotoColorEmoji.ttf"
DEBIAN_FOLDER = Path("/usr/share/fonts/truetype/noto")


def find_emoji(folder: Path | None = None) -> Path:
    """Find the font: in ``folder`` if given, otherwise in the cache, otherwise in Debian's folder."""
    candidates = [folder] if folder else [cache_folder() / "noto-emoji", DEBIAN_FOLDER]
    for candidate in candidates:
        path = candidate if candidate.suffix == ".ttf" else candidate / FONT
        if path.is_file():
            return path
    raise DataError(
        f"no {FONT} in {' or '.join(map(str, candidates))}; pass its folder with --data PATH, download it with "
        "`sh tools/noto-emoji.sh`, or install Debian's package fonts-noto-color-emoji"
    )


def read_emoji(font: Path, size: int, channels: Channels = 3) -> Tensor:
    """Return the images (N, channels, size, size) uint8 of `emoji_pictures`."""
    return emoji_pictures(font, size, channels).images


def emoji_pictures(font: Path, size: int, channels: Channels = 3) -> Pictures:
    """Return each distinct bitmap of a color font, in the font's order.

    The font's 136x128 pictures are padded to squares and resized. The background is white, or transparent with alpha.

    Raises:
        DataError: the file is not a font with color bitmaps (tables CBDT and CBLC).
    """
    layout = Layout(size, size, channels=channels)
    path = cache_path(f"emoji-{size}", "2", layout, *stamp(font))
    bitmaps = [] if is_kept(path) else dict.fromkeys(bitmaps_of(font))  # some glyphs share a bitmap
    found = kept_pictures(path, layout, [(f"glyph {i}", partial(padded, bitmap)) for i, bitmap in enumerate(bitmaps)])
    if not found.names:
        raise DataError(f"{font} contains no color bitmaps")
    return found


def bitmaps_of(font: Path) -> list[bytes]:
    """Return the PNG files in the first strike of a font's CBDT table."""
    from fontTools.ttLib import TTFont, TTLibError

    try:
        with TTFont(font, lazy=True) as tables:
            if "CBDT" not in tables:
                return []
            return [glyph.imageData for glyph in tables["CBDT"].strikeData[0].values() if hasattr(glyph, "imageData")]
    except (TTLibError, OSError) as error:
        raise DataError(f"{font} cannot be read: {reason(error)}") from error


def padded(png: bytes) -> Image.Image:
    """Center a PNG file on a transparent square."""
    image = Image.open(io.BytesIO(png)).convert("RGBA")
    side = max(image.size)
    ground = Image.new("RGBA", (side, side))
    ground.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return ground
