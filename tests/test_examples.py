"""Each example, before and after: few lines differ, and the losses are the same."""

from __future__ import annotations

import difflib
import importlib.util
import sys
from pathlib import Path

import pytest
import torch

import fastgan

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def load(path: Path):
    spec = importlib.util.spec_from_file_location(f"example_{path.parent.name}_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


FRAMEWORKS = {"accelerate", "lightning"}  # whose examples run where they are installed
NAMES = sorted(path.name for path in EXAMPLES.iterdir() if path.is_dir())


@pytest.fixture
def double_precision():
    """Rounding that training amplifies would hide a wrong gradient behind a tolerance."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def losses(path: Path) -> torch.Tensor:
    """Run a script with the packages beside it, as Python does, and with no module that an earlier script changed."""
    beside = [folder.name for folder in path.parent.iterdir() if folder.is_dir()]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(path.parent)
        try:
            batch = 20 if path.parent.name == "ctgan" else 8  # whose packs are of ten rows
            return torch.tensor(load(path).train(steps=4, batch=batch))
        finally:
            fastgan.patch_torch_utils().restore()
            for name in [name for name in sys.modules if name.split(".")[0] in beside]:
                del sys.modules[name]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("double_precision")
def test_an_example_trains_to_the_same_losses_before_and_after(name):
    if name in FRAMEWORKS:
        pytest.importorskip(name, reason=f"{name} is not installed: make examples")
    before, after = (losses(EXAMPLES / name / f"{part}.py") for part in ("before", "after"))
    assert before.isfinite().all()
    assert before.unique().numel() == before.numel()
    torch.testing.assert_close(after, before, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_the_change_to_an_example_is_a_few_lines(name):
    before, after = ((EXAMPLES / name / f"{part}.py").read_text().splitlines() for part in ("before", "after"))
    added = [line for line in difflib.ndiff(before, after) if line.startswith("+ ") and line[2:].strip()]
    assert 1 <= len(added) <= 5, added
