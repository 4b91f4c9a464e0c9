from __future__ import annotations

import sys
from pathlib import Path

import pytest

import fastgan

ROOTS = ("torch_utils", "op", "basicsr", "networks", "project")


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch):
    """The packages can be imported, and nothing of them or of a patch is left afterwards."""
    monkeypatch.syspath_prepend(Path(__file__).parent / "stand_ins")
    yield
    fastgan.patch_torch_utils().restore()
    for name in [name for name in sys.modules if name.split(".")[0] in ROOTS]:
        del sys.modules[name]
