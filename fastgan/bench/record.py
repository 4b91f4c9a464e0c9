"""The file of a result: JSON with a schema number, the options, the machine, and the cases measured so far."""

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
    """Load a result.

    Raises:
        ValueError: the file is not a result of fastgan bench, or has another schema.
    """
    try:
        results = strict_json.loads(path.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(results, dict) or not isinstance(results.get("cases"), list):
        raise ValueError(f"{path} is not a result of fastgan bench: it has no cases")
    if results.get("schema") != SCHEMA:
        raise ValueError(f"{path} has schema {results.get('schema')}, this version reads {SCHEMA}: measure it again")
    return results


def save(results: Results, path: Path) -> None:
    """Write a result atomically. If the run is killed while it writes, the previous file remains."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(strict_json.dumps(results, indent=2) + "\n")
    partial.replace(path)


def names(results: Results) -> list[str]:
    """Return the names of the measured cases, then those of the remaining ones."""
    return [*(case["name"] for case in results["cases"]), *results["not_yet_run"]]


def refuse_other_conditions(results: Results, path: Path, device: torch.device, root: Path) -> None:
    """Raise if a resumed result would mix different conditions.

    Raises:
        ValueError: the commit, device, number of threads or PyTorch version differs; the message names both values.
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
            raise ValueError(f"{path} has {what} {then}, this run has {now}: the results would not be comparable")


def listed(words: Sequence[str], most: int = 6) -> str:
    rest = len(words) - most
    return ", ".join(words[:most]) + (f" and {rest} more" if rest > 0 else "")
