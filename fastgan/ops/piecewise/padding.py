"""F.pad with mode "reflect", "replicate" and "circular". PyTorch's constant padding propagates no zeros."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastgan.ops.piecewise.autograd import Linear, Step, as_autocast, is_eligible, piecewise
from fastgan.ops.piecewise.pooling import placeholder_for

aten: Any = torch.ops.aten

_KINDS = {"reflect": "reflection", "replicate": "replication", "circular": "circular"}


def _bordered(input: Tensor, pad: Sequence[int], kind: str) -> Linear:
    """Pad the last dimensions with PyTorch's operator and its backward."""
    placeholder = placeholder_for(input)
    forward, backward = (getattr(aten, f"{kind}_pad{len(pad) // 2}d{end}") for end in ("", "_backward"))
    return Linear(lambda x: forward(x, pad), lambda y: backward(y, placeholder(y), pad))


def _circular(pad: Sequence[int]) -> Linear:
    def transpose(y: Tensor) -> Tensor:
        """Add the padding on each side to the opposite edge, from which it was copied."""
        for dim, (before, after) in enumerate(zip(pad[::2], pad[1::2], strict=True), 1):
            size = y.shape[-dim] - before - after
            middle = y.narrow(-dim, before, size).clone()
            middle.narrow(-dim, size - before, before).add_(y.narrow(-dim, 0, before))
            middle.narrow(-dim, 0, after).add_(y.narrow(-dim, before + size, after))
            y = middle
        return y

    return Linear(lambda x: F.pad(x, pad, mode="circular"), transpose)


def _pad(input: Tensor, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Tensor:
    if mode not in _KINDS or not is_eligible(input) or not _is_plain(input, pad):
        return F.pad(input, pad, mode, value)

    def run(x: Tensor) -> Step:
        linear = _circular(pad) if mode == "circular" else _bordered(x, pad, _KINDS[mode])
        return Step(F.pad(x, pad, mode, value), linear)

    three_reflected = mode == "reflect" and len(pad) == 6  # autocast has no entry for this one
    cast = as_autocast(input, mode != "circular" and not three_reflected)
    return piecewise(cast, run, fills_zeros=mode != "circular")  # type: ignore[no-any-return]


def _is_plain(input: Tensor, pad: Sequence[int]) -> bool:
    """Return whether all sizes are numbers of at least 0. On a GPU, deterministic mode has its own implementation."""
    has_own_form = torch.are_deterministic_algorithms_enabled() and not input.is_cpu
    return not has_own_form and len(pad) in (2, 4, 6) and all(type(size) is int and size >= 0 for size in pad)


ROUTES = {F.pad: _pad}
