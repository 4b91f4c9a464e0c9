"""What a run was trained on: a digest for the checkpoint, and a file that says which pictures changed since."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from pathlib import Path

from fastgan.trainer.data.drawn import Source
from fastgan.trainer.data.sources import Images
from fastgan.trainer.errors import DataError

NAMED = 3  # changed pictures to name


@dataclass
class DataRecord:
    digest: str  # of names, pixels and labels
    pictures: dict[str, str] = field(default_factory=dict)  # name: hash of the pixels, and the class
    held_out: list[str] = field(default_factory=list)  # names
    class_names: list[str] | None = None

    def text(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False, indent=0) + "\n"

    @classmethod
    def read(cls, path: Path) -> DataRecord | None:
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):  # an older run, or a file that a crash cut short
            return None


def record_of(source: Source) -> DataRecord | None:
    """Describe a source's samples, or return None if they are generated. Call this before samples are held out."""
    if not isinstance(source, Images):
        return None
    if source.names is None or source.hashes is None:
        pixels = blake2b(source.images.cpu().numpy().data, digest_size=16)
        if source.labels is not None:
            pixels.update(source.labels.cpu().numpy().data)
        return DataRecord(pixels.hexdigest(), class_names=source.class_names)
    labels = [""] * len(source.names) if source.labels is None else source.labels.tolist()
    kinds = source.class_names or []
    pictures = {
        name: content if label == "" else f"{content} {kinds[label]}"
        for name, content, label in zip(source.names, source.hashes, labels, strict=True)
    }
    digest = blake2b(json.dumps(list(pictures.items())).encode(), digest_size=16).hexdigest()
    return DataRecord(digest, pictures, class_names=source.class_names)


def differences(before: DataRecord | None, now: DataRecord) -> str:
    """Say in one line which pictures were added, removed or changed."""
    if before is None or not before.pictures:
        return "its pixels or labels are others"
    old, new = before.pictures, now.pictures
    found = {
        "added": [name for name in new if name not in old],
        "removed": [name for name in old if name not in new],
        "changed": [name for name in new if name in old and new[name] != old[name]],
    }
    parts = [f"{len(names):,} {what} ({listed(names)})" for what, names in found.items() if names]
    return ", ".join(parts) or "its pictures are in another order"


def listed(names: list[str]) -> str:
    return ", ".join(names[:NAMED]) + (", ..." if len(names) > NAMED else "")


def check_same(digest: str | None, before: DataRecord | None, now: DataRecord | None, ok: bool) -> bool:
    """Return whether the data is that of the digest in a checkpoint; None is the digest of an older run's.

    Raises:
        DataError: it is not, and the user has not said that this is `ok`; or its classes are others.
    """
    if digest is None or now is None or digest == now.digest:
        return True
    known = before if before is not None and before.digest == digest else None
    what = differences(known, now)
    if not ok:
        raise DataError(
            f"the data is not what the run was trained on: {what}; --data-changed-ok continues with the changed data"
        )
    if before is not None and before.class_names != now.class_names:
        was, found = (", ".join(record.class_names or ["none"]) for record in (before, now))
        raise DataError(f"the classes are not those of the run: {was} became {found}; start a new run for this data")
    print(f"the data has changed: {what}")
    return False
