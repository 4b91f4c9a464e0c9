"""Functions that PyTorch can differentiate only once, written so that every order of derivative exists."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastgan.ops.lacking import distances, losses, recurrent, segments

__all__ = ["ROUTES"]

ROUTES: dict[Any, Callable[..., Any]] = {**distances.ROUTES, **segments.ROUTES, **recurrent.ROUTES, **losses.ROUTES}
