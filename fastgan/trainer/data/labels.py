"""Labels of pictures: from dataset.json, from the folders that they are in, or none. Splits of a data set."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from fastgan.trainer.data.options import LabelRule
from fastgan.trainer.errors import DataError

SPLITS = ("train", "training", "val", "valid", "validation", "test", "testing")
JSON = "dataset.json"
SHOWN = 12  # class names in a line


class Labels(NamedTuple):
    of: dict[str, int] | None  # the class of each picture's name; a picture that is missing here has no label
    names: list[str]  # of the classes
    origin: str  # where the labels come from, or why there are none

    def line(self, used: Sequence[str]) -> str:
        """Return one line about the labels. `used` are the classes with a readable picture."""
        if self.of is None:
            return self.origin
        missing = [name for name in self.names if name not in used]
        without = f"; no pictures of {shown(missing)}" if missing else ""
        return f"{counted(used)} from {self.origin}: {shown(used)}{without}"


def root_of(names: Iterable[str], stop_at_splits: bool = False) -> PurePosixPath:
    """Return the folder that all pictures are below of, without shards and, if asked, without splits."""
    parents = [PurePosixPath(name).parent.parts for name in names]
    shared: list[str] = []
    for parts in zip(*parents, strict=False):
        if len(set(parts)) > 1 or is_shard(parts[0]) or (stop_at_splits and parts[0].lower() in SPLITS):
            break
        shared.append(parts[0])
    return PurePosixPath(*shared)


def is_shard(folder: str) -> bool:
    """Whether a folder is a part of a large data set, such as 00000: five digits or more."""
    return len(folder) >= 5 and folder.isdecimal()


def chosen_split(names: Sequence[str], split: str | None) -> tuple[list[str], str | None]:
    """Return the names in the split, and a line about it. Without `split`, a data set with splits gives its train.

    Folders count as splits if all pictures are in folders that are called like one.

    Raises:
        DataError: there is no such split.
    """
    root = root_of(names, stop_at_splits=True)
    firsts = [PurePosixPath(name).relative_to(root).parts for name in names]
    top = {parts[0] if len(parts) > 1 else "" for parts in firsts}
    if split is None:
        if not top or not all(folder.lower() in SPLITS for folder in top):
            return list(names), None
        ranked = sorted(top, key=lambda folder: SPLITS.index(folder.lower()))
        split = ranked[0]
    elif split not in top:
        there = ", ".join(sorted(top - {""})) or "no folders"
        raise DataError(f"there is no split {split!r}: the data has {there}")
    kept = [name for name, parts in zip(names, firsts, strict=True) if len(parts) > 1 and parts[0] == split]
    others = sorted(top - {split, ""})
    return kept, f"the split {split}" + (f", not {', '.join(others)} (--split NAME)" if others else "")


def find_labels(names: Sequence[str], rule: LabelRule, listed: bytes | None, where: str = JSON) -> Labels:
    """Return the labels of pictures.

    auto: those of dataset.json if it has any, else the outermost folders if there are at least two and every picture is
    in one, else none. Shards (00000, 00001, ...) are not classes, except with the rule folders.

    Args:
        names: of the pictures, with slashes.
        listed: the content of dataset.json, or None.
        where: its name, for messages.

    Raises:
        DataError: the rule does not fit the data.
    """
    if rule == "none":
        return Labels(None, [], "no labels (--labels none)")
    if rule in ("auto", "json") and listed is not None:
        found = from_json(names, listed, where)
        if found is not None:
            return found
    if rule == "json":
        raise DataError(f"--labels json needs a {JSON} with labels beside the pictures: {where} has none")
    found = from_folders(names, forced=rule == "folders")
    if found is None and rule == "folders":
        raise DataError("--labels folders needs every picture in a folder that is its class")
    return found or Labels(None, [], f"no labels: neither a {JSON} nor a folder for each class")


def from_folders(names: Sequence[str], forced: bool = False) -> Labels | None:
    root = root_of(names)
    paths = [PurePosixPath(name).relative_to(root).parts for name in names]
    if forced and root.parts and all(len(parts) == 1 for parts in paths):  # one class
        paths = [(root.name, *parts) for parts in paths]
    folders = [parts[0] if len(parts) > 1 else None for parts in paths]
    kinds = sorted({folder for folder in folders if folder is not None})
    if not kinds or None in folders or (len(kinds) < 2 and not forced):
        return None
    if not forced and all(map(is_shard, kinds)):
        return None
    index = {kind: number for number, kind in enumerate(kinds)}
    of = {name: index[folder] for name, folder in zip(names, folders, strict=True) if folder is not None}
    return Labels(of, kinds, "folder names")


def from_json(names: Sequence[str], listed: bytes, where: str) -> Labels | None:
    """Read StyleGAN's dataset.json: {"labels": [["00000/img00000000.png", 5], ...]}, or {"labels": null}."""
    try:
        content = json.loads(listed)
        pairs = content["labels"] if isinstance(content, dict) else None
        if not pairs:
            return None
        given = dict(pairs.items() if isinstance(pairs, dict) else pairs)
        values = {name: class_of(value) for name, value in given.items()}
        classes: list[Any] = sorted(set(values.values()))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{where} cannot be read ({error}): --labels none leaves it out") from error
    index = {kind: number for number, kind in enumerate(classes)}
    root = PurePosixPath(where).parent
    of = {}
    for name in names:
        path = PurePosixPath(name)
        key = path.relative_to(root).as_posix() if root in path.parents else name
        if key in values:
            of[name] = index[values[key]]
    if not of:
        raise DataError(f"{where} names none of the pictures: --labels folders or none leaves it out")
    kinds = [str(kind) for kind in classes]
    return Labels(of, kinds, where)


def class_of(value: Any) -> Any:
    """Return a label: a number, a name, or the place of the one in a one-hot vector."""
    if isinstance(value, list):
        if sorted(value) != [0] * (len(value) - 1) + [1]:
            raise ValueError("its labels are vectors that are not one-hot")
        return value.index(1)
    if not isinstance(value, int | str):
        raise TypeError(f"its label {value!r} is neither a number nor a name")
    return value


def counted(kinds: Sequence[str]) -> str:
    return f"{len(kinds)} class" + ("" if len(kinds) == 1 else "es")


def shown(kinds: Sequence[str]) -> str:
    more = f" and {len(kinds) - SHOWN} more" if len(kinds) > SHOWN else ""
    return ", ".join(kinds[:SHOWN]) + more
