"""JSON for strict parsers: numbers that are not finite are written as the strings NaN and Infinity."""

from __future__ import annotations

import json
from math import isfinite, isnan
from typing import Any

_NUMBERS = {"NaN": float("nan"), "Infinity": float("inf"), "-Infinity": float("-inf")}


def dumps(value: Any, indent: int | None = None) -> str:
    return json.dumps(_named(value), indent=indent, allow_nan=False)


def loads(text: str) -> Any:
    """Parse the output of `dumps`."""
    return _numbered(json.loads(text))


def _named(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _named(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_named(each) for each in value]
    if isinstance(value, float) and not isfinite(value):
        return "NaN" if isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _numbered(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _numbered(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_numbered(each) for each in value]
    return _NUMBERS.get(value, value) if isinstance(value, str) else value
