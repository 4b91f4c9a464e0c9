"""Child processes of a script. An environment variable and a sitecustomize.py start the launcher in them."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path

from fastgan.launcher.command import Settings

VARIABLE = "FASTGAN_RUN"
FOLDER = str(Path(__file__).parent / "start")


def include(settings: Settings) -> None:
    """Start the launcher in all Python processes that this process starts from now on.

    A process that never imports PyTorch is not affected.
    """
    if VARIABLE in os.environ:
        return
    os.environ[VARIABLE] = json.dumps({**asdict(settings), "compare": 0})
    others = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = FOLDER if not others else FOLDER + os.pathsep + others


def begin() -> None:
    """Start the launcher in a child process. This runs after PyTorch is imported."""
    from fastgan.launcher import session

    given = os.environ.get(VARIABLE)
    if given:
        session.begin_process(Settings(**json.loads(given)))
