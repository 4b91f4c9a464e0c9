"""The points at which a penalty takes the gradient."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastgan.ops.gradient_penalty.drawn import uniform
from fastgan.ops.gradient_penalty.inputs import Inputs, check_inputs, check_same_form, floating, replaced


def points(kind: Any, real: Inputs, fake: Inputs | None, generator: torch.Generator | None) -> Iterator[Inputs]:
    """Yield the points, in the structure of ``real``: two for "r1+r2", otherwise one."""
    check_inputs("real", real)
    if kind in ("r1", "r1-finite-difference") or (callable(kind) and fake is None):
        yield real
    elif kind == "dragan":
        yield _perturbed(real, generator)
    else:
        if fake is None:
            raise TypeError(f"kind {kind!r} needs fake, got None")
        check_inputs("fake", fake)
        check_same_form(real, fake)
        if kind == "r1+r2":
            yield real
            yield fake
        elif kind == "r2":
            yield fake
        else:
            yield _between(real, fake, _alpha(real, generator))


def _alpha(real: Inputs, generator: torch.Generator | None) -> Tensor:
    """Draw alpha, (N,), uniform in [0, 1)."""
    first = floating(real)[0]
    return uniform([first.shape[0]], first, generator)


def _beside(alpha: Tensor, x: Tensor) -> Tensor:
    """Reshape alpha (N,) to (N, 1, ...), so that it broadcasts over x (N, *S)."""
    same = alpha.dtype == x.dtype and alpha.device == x.device
    return (alpha if same else alpha.to(x)).view(-1, *[1] * (x.ndim - 1))


def _fixed(x: Tensor) -> Tensor:
    return x.detach() if x.requires_grad else x


def _perturbed(real: Inputs, generator: torch.Generator | None) -> Inputs:
    noises = iter([uniform(x.shape, x, generator) for x in floating(real)])
    alpha = _alpha(real, generator)
    return replaced(real, lambda x: x.detach() + _beside(alpha, x) * 0.5 * x.detach().std() * next(noises))


def _between(real: Inputs, fake: Inputs, alpha: Tensor) -> Inputs:
    if isinstance(real, Tensor) and isinstance(fake, Tensor) and real.dtype == fake.dtype:
        return torch.lerp(_fixed(fake), _fixed(real), _beside(alpha, real))
    fakes = iter(floating(fake))
    return replaced(real, lambda x: torch.lerp(next(fakes).detach().to(x.dtype), x.detach(), _beside(alpha, x)))
