"""Runs the README's commands for one's own pictures, on a zip file of 300 emoji, and reports the time of each.

    make pictures                      # or: python -m tools.pictures --font NotoColorEmoji.ttf

The pictures have alpha channels, are not square, and lie in folders that are their classes. The commands train,
evaluate, generate an interpolation, project a picture and fine-tune the result on 90 other pictures. On two CPU cores
they take less than ten minutes.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from PIL import Image

from fastgan.trainer.data.emoji import find_emoji

LIMIT = 600.0  # seconds of all commands together
HEIGHT, WIDTH = 128, 192
PHOTOS = {  # code points of each class
    "faces": (*range(0x1F600, 0x1F650), *range(0x1F910, 0x1F930), *range(0x1F970, 0x1F980)),
    "animals": (*range(0x1F400, 0x1F440), *range(0x1F980, 0x1F9B0)),
    "food": (*range(0x1F32D, 0x1F380), *range(0x1F950, 0x1F970)),
}
MORE = {
    "activities": range(0x1F3A0, 0x1F3F0),
    "objects": range(0x1F4A0, 0x1F500),
    "transport": range(0x1F680, 0x1F6C0),
}


def emoji(font: Path, points: range | tuple[int, ...]) -> Iterator[Image.Image]:
    """Yield the emoji of code points, each in the middle of a transparent picture that is not square."""
    from fontTools.ttLib import TTFont

    with TTFont(font, lazy=True) as tables:
        glyphs, bitmaps = tables.getBestCmap(), tables["CBDT"].strikeData[0]
        for point in points:
            bitmap = bitmaps.get(glyphs.get(point))
            if bitmap is not None:
                image = Image.open(io.BytesIO(bitmap.imageData)).convert("RGBA")
                ground = Image.new("RGBA", (WIDTH, HEIGHT))
                ground.paste(image, ((WIDTH - image.width) // 2, (HEIGHT - image.height) // 2))
                yield ground


def write_zip(path: Path, font: Path, classes: dict[str, range | tuple[int, ...]], each: int) -> Path:
    """Write a zip file with `each` pictures in the folder of each class."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, points in classes.items():
            images = list(islice(emoji(font, points), each))
            assert len(images) == each, f"{font} has {len(images)} pictures for {name}, not {each}"
            for number, image in enumerate(images):
                content = io.BytesIO()
                image.save(content, "PNG")
                archive.writestr(f"{name}/{number:03}.png", content.getvalue())
    return path


def commands(minutes: float, more_minutes: float) -> list[list[str]]:
    """Return the README's commands."""
    pictures = "--image-size 32x48 --channels 4 --conditional"
    lines = [
        f"train folder --data photos.zip {pictures} --score-every 200 --minutes {minutes:g}",
        "evaluate runs/folder",
        "generate runs/folder --grid 3x4 --interpolate 60",
        "project runs/folder picture.png",
        f"train folder --data more.zip --name more {pictures} --init-from runs/folder --minutes {more_minutes:g}",
    ]
    return [line.split() for line in lines]


def check(folder: Path) -> dict[str, float]:
    """Check the files that the commands wrote, and return the scores and errors."""
    run = folder / "runs" / "folder"
    with Image.open(run / "generated" / "interpolation.webp") as animation:
        assert animation.n_frames == 60
        assert animation.width > animation.height
    with Image.open(run / "generated" / "sample-0000.png") as sample:
        assert (sample.mode, sample.size) == ("RGBA", (48, 32))
    for name in ("folder", "more"):
        assert (folder / "runs" / name / "report.html").stat().st_size > 0
        assert json.loads((folder / "runs" / name / "config.json").read_text())["class_names"]
    projection = json.loads((run / "projected" / "picture" / "projection.json").read_text())
    assert projection["rms_pixel_error"] < projection["rms_pixel_error_at_start"]
    scores = json.loads((run / "evaluation.json").read_text())
    assert scores["n"] == 30
    found = {key: value for key, value in scores.items() if isinstance(value, float)}
    return found | {"error of the projection": projection["rms_pixel_error"]}


def run(folder: Path, font: Path, minutes: float, more_minutes: float) -> float:
    """Run everything in a folder and return the seconds of all commands."""
    write_zip(folder / "photos.zip", font, PHOTOS, 100)
    write_zip(folder / "more.zip", font, MORE, 30)
    next(emoji(font, PHOTOS["animals"])).save(folder / "picture.png")
    root = str(Path(__file__).resolve().parent.parent)
    environ = {**os.environ, "PYTHONPATH": root, "XDG_CACHE_HOME": str(folder / "cache")}
    total = 0.0
    for command in commands(minutes, more_minutes):
        print(f"$ fastgan {' '.join(command)}", flush=True)
        start = time.monotonic()
        subprocess.run([sys.executable, "-m", "fastgan", *command], cwd=folder, env=environ, check=True)
        seconds = time.monotonic() - start
        total += seconds
        print(f"  {seconds:.0f} s", flush=True)
    for name, value in check(folder).items():
        print(f"{name:28}{value:.4g}")
    return total


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--font", type=Path, help="NotoColorEmoji.ttf, or its folder; default: as for fastgan train")
    parser.add_argument("--minutes", type=float, default=5.0, help="of training, as in the README")
    parser.add_argument("--more-minutes", type=float, default=2.0, help="of fine-tuning, as in the README")
    parser.add_argument("--out", type=Path, help="folder to work in and keep; default: a temporary one")
    given = parser.parse_args()
    font = find_emoji(given.font)
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.out or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        total = run(folder, font, given.minutes, given.more_minutes)
    print(f"all commands: {total:.0f} s, limit {LIMIT:.0f} s")
    return 0 if total <= LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
