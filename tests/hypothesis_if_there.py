"""hypothesis; where it is not installed, as on a machine that has a GPU and no network, its tests skip and say so."""

from __future__ import annotations

from unittest.mock import MagicMock

import pytest

try:
    from hypothesis import given, settings
    from hypothesis import strategies as st
except ModuleNotFoundError:
    st = MagicMock()

    def given(**_):
        return pytest.mark.skip(reason="hypothesis is not installed")

    def settings(**_):
        return lambda test: test


__all__ = ["given", "settings", "st"]
