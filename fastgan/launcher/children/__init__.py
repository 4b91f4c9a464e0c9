"""Processes that a script starts: an environment variable and a sitecustomize.py tell them."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path

from fastgan.launcher.command import Settings

VARIABLE = "FASTGAN_RUN"
FOLDER = str(Path(__file__).parent / "start")


def include(settings: Settings) -> None:
    """From now on, Python processes that this one starts are under the launcher too.

    A process that never imports PyTorch does not notice.
    """
    if VARIABLE in os.environ:
        return
    os.environ[VARIABLE] = json.dumps({**asdict(settings), "compare": 0})
    others = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = FOLDER if not others else FOLDER + os.pathsep + others


def begin() -> None:
    """In such a process, once PyTorch is imported."""
    from fastgan.launcher import session

    given = os.environ.get(VARIABLE)
    if given:
        session.begin_process(Settings(**json.loads(given)))
