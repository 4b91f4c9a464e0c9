"""The file of a result: JSON with a schema number, what was asked, where it ran, and the cases measured so far."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fastgan import strict_json
from fastgan.bench.provenance import commit_of, device_name

Results = dict[str, Any]

SCHEMA = 2


def load(path: Path) -> Results:
    """Raises: ValueError if the file is none of ours, or of another schema."""
    try:
        results = strict_json.loads(path.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(results, dict) or not isinstance(results.get("cases"), list):
        raise ValueError(f"{path} is no result of fastgan bench: it has no cases")
    if results.get("schema") != SCHEMA:
        raise ValueError(f"{path} has schema {results.get('schema')}, this version reads {SCHEMA}: measure it again")
    return results


def save(results: Results, path: Path) -> None:
    """All at once, so that a run killed while it writes leaves the file of the case before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(strict_json.dumps(results, indent=2) + "\n")
    partial.replace(path)


def names(results: Results) -> list[str]:
    """The cases that were measured, and those that are still to be."""
    return [*(case["name"] for case in results["cases"]), *results["not_yet_run"]]


def refuse_other_conditions(results: Results, path: Path, device: torch.device, root: Path) -> None:
    """A result goes on only as it began.

    Raises:
        ValueError: another commit, device, number of threads or PyTorch; the message names both.
    """
    commit, dirty = commit_of(root)
    here = {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "commit": commit,
        "dirty": dirty,
    }
    for what, now in here.items():
        then = results["provenance"][what]
        if then != now:
            raise ValueError(f"{path} was begun with {what} {then}, here it is {now}: results would not be comparable")


def listed(words: Sequence[str], most: int = 6) -> str:
    rest = len(words) - most
    return ", ".join(words[:most]) + (f" and {rest} more" if rest > 0 else "")
