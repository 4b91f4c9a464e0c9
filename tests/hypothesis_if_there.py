"""hypothesis, if it is installed. Otherwise its tests are skipped with the reason, as on a machine without network.

Each example starts with the same seed of torch, so that a failure can be reproduced. A run draws the same examples
every time; with FASTGAN_TESTS=all it draws new ones.
"""

from __future__ import annotations

import os
from unittest.mock import MagicMock

import pytest
import torch

try:
    from hypothesis import given, register_random, settings
    from hypothesis import strategies as st

    class _TorchRandom:
        seed = staticmethod(torch.manual_seed)
        getstate = staticmethod(torch.get_rng_state)
        setstate = staticmethod(torch.set_rng_state)

    _random = _TorchRandom()  # hypothesis keeps a weak reference
    register_random(_random)
    settings.register_profile("fixed", derandomize=os.environ.get("FASTGAN_TESTS") != "all")
    settings.load_profile("fixed")
except ModuleNotFoundError:
    st = MagicMock()

    def given(**_):
        return pytest.mark.skip(reason="hypothesis is not installed")

    def settings(**_):
        return lambda test: test


__all__ = ["given", "settings", "st"]
