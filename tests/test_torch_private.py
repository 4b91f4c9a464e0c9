from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fastgan import torch_private

PACKAGE = Path(torch_private.__file__).parent


@pytest.mark.parametrize("find", [torch_private.checkpoint_hook, torch_private._frame_of_checkpoint])
def test_a_region_of_checkpoint_is_found_in_every_release(find):
    seen = []

    def function(x):
        seen.append(find())
        return x.sin()

    x = torch.randn(3, requires_grad=True)
    function(x)
    for _ in range(2):
        y = checkpoint(function, x, use_reentrant=False)
    outside, first, second = seen
    assert outside is None
    assert first is not None
    assert second is not None
    assert first is not second
    y.sum().backward()
    assert len(seen) == 4


def test_the_ops_take_private_names_of_pytorch_from_one_module():
    private = re.compile(r"torch\._C\b|from torch\._|from torch\.fx\._|import _get_current|forward_ad\._")
    for path in [PACKAGE / "backends.py", *sorted((PACKAGE / "ops").rglob("*.py"))]:
        assert not private.search(path.read_text()), path
