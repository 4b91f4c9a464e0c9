"""Pictures of any size from a folder or a zip file, cropped, resized once and cached as memory-mapped bytes."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from fastgan.trainer.data.cache import cache_path, mapped, write, written
from fastgan.trainer.data.containers import Container, open_container
from fastgan.trainer.data.labels import JSON, chosen_split, find_labels
from fastgan.trainer.data.options import LabelRule
from fastgan.trainer.data.pixels import UNREADABLE, Layout, endings, large_pictures_refused, open_image, pixels_of
from fastgan.trainer.errors import DataError, reason

REPORTED = 5  # skipped files to report by name
MOST_THREADS, AHEAD = 8, 64  # threads that convert pictures, and pictures that they convert at a time
MANY = 2000  # pictures whose first reading takes long enough to announce it


@dataclass
class Pictures:
    """Every readable picture of a folder or zip file."""

    images: Tensor  # (N, C, H, W) uint8
    labels: Tensor | None  # (N,)
    names: list[str]  # of the files
    hashes: list[str]  # of their pixels
    class_names: list[str] | None = None
    notes: list[str] = field(default_factory=list)  # lines about the data, for the user
    skipped: list[str] = field(default_factory=list)  # files that are not used, each with the reason
    split: str | None = None  # "the split train", and which others there are


def read_pictures(
    path: Path, layout: Layout, rule: LabelRule = "auto", split: str | None = None, quiet: bool = False
) -> Pictures:
    """Read every picture in a folder or zip file.

    Files that are not pictures, are truncated or too large are skipped, and the first ones are named on stderr, also if
    the pictures come from the cache. The cache key covers the files' names, sizes and modification times.

    Raises:
        DataError: the data cannot be read, contains fewer than two readable pictures, or the labels do not fit it.
    """
    container = open_container(path)
    listed = [entry for entry in container.entries if PurePosixPath(entry.name).suffix.lower() in endings()]
    if not listed:
        instead = other_endings(container)
        lost = f"; {container.lost[0]}" if container.lost else ""
        raise DataError(
            f"{path} contains 0 readable images{instead}, but at least 2 are needed{zips_in(container)}{lost}"
        )
    names, about_split = chosen_split([entry.name for entry in listed], split)
    chosen = set(names)
    entries = [entry for entry in listed if entry.name in chosen]
    listed_labels = dataset_json(container, names) if rule in ("auto", "json") else (None, JSON)
    labels = find_labels(names, rule, *listed_labels)

    where = cache_path(f"{path.resolve().name}-{layout.width}", "3", str(path.resolve()), layout, entries)
    opened = [(name, partial(opened_from, container, name)) for name in names]
    found = kept_pictures(where, layout, opened)
    found.notes = [f"{len(found.names):,} pictures" + (f" in {about_split}" if about_split else "")]
    found.split = about_split
    if others := sum(container.endings().values()) - len(listed) - (JSON in names_of(container)):
        are = "file is no picture" if others == 1 else "files are not pictures"
        found.notes.append(f"{others:,} {are}{other_endings(container)}{zips_in(container)}")
    if labels.of is not None:
        unlabeled = [name for name in found.names if name not in labels.of]
        found.skipped += [f"{name}: it has no label" for name in unlabeled]
        found = without(found, set(unlabeled))
        numbers = torch.tensor([labels.of[name] for name in found.names], device="cpu")
        used, found.labels = numbers.unique(return_inverse=True)  # no class without pictures, which is never trained
        found.class_names = [labels.names[number] for number in used.tolist()]
    found.notes.append(labels.line(found.class_names or []))
    found.skipped += container.lost
    if not quiet:
        report_skipped(found.skipped)
    if len(found.names) < 2:
        raise DataError(f"{path} contains {len(found.names)} readable images, but at least 2 are needed")
    return found


def read_folder(path: Path, size: int) -> tuple[Tensor, Tensor | None]:
    """Return square RGB pictures (N, 3, size, size) uint8 of a folder or zip file, and their labels, if any."""
    found = read_pictures(path, Layout(size, size))
    return found.images, found.labels


def opened_from(container: Container, name: str) -> Image.Image:
    return open_image(container.read(name))


def names_of(container: Container) -> set[str]:
    return {PurePosixPath(entry.name).name for entry in container.entries}


def other_endings(container: Container) -> str:
    others = Counter({end: count for end, count in container.endings().items() if end not in endings()})
    most = ", ".join(f"{end or 'no ending'} {count}" for end, count in others.most_common(4))
    return f" ({most})" if most else ""


def zips_in(container: Container) -> str:
    """Say how to read a zip file that lies among the data."""
    names = [entry.name for entry in container.entries if entry.name.lower().endswith(".zip")]
    if not names:
        return ""
    how = "unpack it" if container.path.is_file() else f"--data {shlex.quote(str(container.path / names[0]))} reads it"
    return f"; {names[0]} is a zip file: {how}"


def dataset_json(container: Container, names: Sequence[str]) -> tuple[bytes | None, str]:
    """Return dataset.json's content and name: in the container, or in the folder that all pictures are in."""
    places = [JSON, *(str(PurePosixPath(*PurePosixPath(names[0]).parts[:depth]) / JSON) for depth in (1, 2))]
    there = {entry.name for entry in container.entries}
    for place in places:
        if place in there:
            try:
                return container.read(place), place
            except UNREADABLE as error:
                raise DataError(f"{place} cannot be read ({reason(error)}): --labels none leaves it out") from error
    return None, JSON


def kept_pictures(path: Path, layout: Layout, images: Sequence[tuple[str, Callable[[], Image.Image]]]) -> Pictures:
    """Return the readable images from the cache file `path`, which is written first if it does not exist."""
    beside = path.with_suffix(".json")  # written last
    if is_kept(path):
        about = json.loads(beside.read_text())
        return Pictures(as_images(mapped(path), layout), None, about["names"], about["hashes"], skipped=about["bad"])
    good: list[str] = []
    hashes: list[str] = []
    bad: list[str] = []
    whole = True  # no file was there that the system did not let us read; that may change without a trace in the key
    quiet = len(images) < MANY or not is_first_rank()
    if not quiet:
        print(f"reading {len(images):,} pictures; later runs take them from the cache", flush=True)

    def parts() -> Iterator[bytes]:
        nonlocal whole
        for values in (good, hashes, bad):
            values.clear()
        rest = converted(images, layout)
        interval = 0.1 if sys.stderr.isatty() else 10.0
        for name, content in tqdm(rest, "reading", len(images), disable=quiet, unit=" pictures", mininterval=interval):
            if not isinstance(content, bytes):
                bad.append(f"{name}: {reason(content)}")
                whole = whole and getattr(content, "errno", None) is None
                continue
            good.append(name)
            hashes.append(blake2b(content, digest_size=8).hexdigest())
            yield content

    found = as_images(written(path, parts), layout)
    about = {"names": good, "hashes": hashes, "bad": bad}
    if good and whole:
        with contextlib.suppress(OSError):  # without this file the next run reads the images again
            write(beside, [json.dumps(about).encode()])
    return Pictures(found, None, good, hashes, skipped=bad)


def converted(
    images: Sequence[tuple[str, Callable[[], Image.Image]]], layout: Layout
) -> Iterator[tuple[str, bytes | Exception]]:
    """Yield each picture's name, and its pixels or why it cannot be read, in order. Threads convert them."""

    def convert(opened: Callable[[], Image.Image]) -> bytes | Exception:
        try:
            return pixels_of(opened(), layout).tobytes()
        except UNREADABLE as error:
            return error

    with large_pictures_refused(), ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1)) as threads:
        for start in range(0, len(images), AHEAD):
            part = images[start : start + AHEAD]
            yield from zip(
                (name for name, _ in part), threads.map(convert, (opened for _, opened in part)), strict=True
            )


def is_kept(path: Path) -> bool:
    return os.path.exists(path.with_suffix(".json")) and os.path.exists(path)


def without(found: Pictures, names: set[str]) -> Pictures:
    """Leave pictures out."""
    if not names:
        return found
    rows = [row for row, name in enumerate(found.names) if name not in names]
    found.images = found.images[rows]
    found.names, found.hashes = ([values[row] for row in rows] for values in (found.names, found.hashes))
    return found


def as_images(pixels: Any, layout: Layout) -> Tensor:
    return torch.from_numpy(pixels).view(-1, layout.channels, *layout.stored)


def is_first_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"


def report_skipped(skipped: Sequence[str]) -> None:
    if not is_first_rank():
        return
    for line in skipped[:REPORTED]:
        print(f"fastgan: skipped {line}", file=sys.stderr)
    if len(skipped) > REPORTED:
        print(f"fastgan: skipped {len(skipped) - REPORTED} more, {len(skipped):,} in all", file=sys.stderr)
