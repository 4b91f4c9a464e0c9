"""torch.compile for the networks, if the run asks for it and the machine can do it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

BACKEND = "inductor"


def compiled(function: Callable[P, R]) -> Callable[P, R]:
    """Compile a function. All batches have one size, so sizes are constants of the graph."""
    result: Callable[P, R] = torch.compile(function, backend=BACKEND, dynamic=False)
    return result


@cache
def why_not(device: torch.device) -> str | None:
    """Return why torch.compile does not work on this device, or None. The check compiles a small function."""
    try:
        torch.compile(lambda x: x.sin() + 1, backend=BACKEND)(torch.zeros(2, device=device))
    except Exception as error:  # whatever a compiler or its absence raises
        message, *_ = str(error).split("\n\n")  # the rest is advice
        return f"{type(error).__name__}: {' '.join(message.split())}"
    return None
