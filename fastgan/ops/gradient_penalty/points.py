"""The points at which a penalty takes the gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgan.ops.gradient_penalty.drawn import uniform
from fastgan.ops.gradient_penalty.inputs import Inputs, check_inputs, check_same_form, floating, replaced


def check_points(kind: Any, real: Inputs, fake: Inputs | None) -> None:
    """Raise if ``points`` cannot make the points of this kind from these arguments."""
    check_inputs("real", real)
    if _uses_fake(kind, fake):
        if fake is None:
            raise TypeError(f"kind {kind!r} needs fake, got None")
        check_inputs("fake", fake)
        check_same_form(real, fake)


def points(kind: Any, real: Inputs, fake: Inputs | None, generator: torch.Generator | None) -> list[Inputs]:
    """Return the points, in the structure of ``real``: two for "r1+r2", otherwise one."""
    if kind == "dragan":
        return [_perturbed(real, generator)]
    if fake is None or not _uses_fake(kind, fake):
        return [real]
    if kind == "r1+r2":
        return [real, fake]
    return [fake if kind == "r2" else _between(real, fake, generator)]


def _uses_fake(kind: Any, fake: Inputs | None) -> bool:
    return kind not in ("r1", "r1-finite-difference", "dragan") and not (callable(kind) and fake is None)


def _alpha(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draw alpha, (N, 1, ...), uniform in [0, 1), so that it broadcasts over a tensor (N, *S)."""
    return uniform([like.shape[0], *[1] * (like.ndim - 1)], like, generator)


def _per_sample(alpha: Tensor, x: Tensor) -> Tensor:
    """Reshape alpha, so that it broadcasts over x (N, *S)."""
    return alpha.to(x).view(-1, *[1] * (x.ndim - 1))


def _perturbed(real: Inputs, generator: torch.Generator | None) -> Inputs:
    noises = iter([uniform(x.shape, x, generator) for x in floating(real)])
    alpha = _alpha(floating(real)[0], generator)
    return replaced(real, lambda x: x.detach() + _per_sample(alpha, x) * 0.5 * x.detach().std() * next(noises))


def _between(real: Inputs, fake: Inputs, generator: torch.Generator | None) -> Inputs:
    if isinstance(real, Tensor) and isinstance(fake, Tensor) and real.dtype == fake.dtype:
        start = fake.detach() if fake.requires_grad else fake
        end = real.detach() if real.requires_grad else real
        return torch.lerp(start, end, uniform([real.shape[0], *[1] * (real.ndim - 1)], real, generator))
    fakes, alpha = iter(floating(fake)), _alpha(floating(real)[0], generator)
    return replaced(real, lambda x: torch.lerp(next(fakes).detach().to(x.dtype), x.detach(), _per_sample(alpha, x)))
