"""Host time of penalties and whole steps: many small layers, whose kernels take less time than calling them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from fastgan.bench import discriminators
from fastgan.bench.case import Case, Make
from fastgan.bench.cases.gradient_penalty import step_case
from fastgan.bench.host import force_fastgan, parts, per_layer

_ANYWHERE = ("cpu", "cuda")
_OBJECTIVES = ("wgan-gp", "r1", "loss+r1", "d-step/r1")
_DEPTHS = 4, 12
_PIXEL = (2, 3, 1, 1)


def one_pixel(depth: int, width: int = 8) -> Callable[[], nn.Module]:
    """Return a maker of a critic whose images have one pixel."""

    def make() -> nn.Module:
        inputs = [3, *[width] * (depth - 1)]
        layers = [part for size in inputs for part in (nn.Conv2d(size, width, 3, 1, 1), nn.LeakyReLU(0.2))]
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(width, 1))

    return make


def _about(objective: str, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    return {"us_per_layer": per_layer(one_pixel, _DEPTHS, _PIXEL, objective, device, dtype)}


def _about_with_parts(objective: str, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    return _about(objective, device, dtype) | {"us_by_part": parts(device, dtype)}


def _case(
    family: str, make: Callable[[], nn.Module], shape: tuple[int, ...], objective: str, about: Any = None
) -> Case:
    case = step_case(family, make, shape, objective, _ANYWHERE, suite="host")
    setup = case.setup
    return replace(case, setup=lambda *where: _with_own_functions(setup(*where)), about=about)


def _with_own_functions(makes: dict[str, Make]) -> dict[str, Make]:
    """Add fastgan's own functions, which such small steps run only inside ``use_backend``."""
    return makes | {"fastgan, own functions": force_fastgan({"": makes["fastgan"]})[""]}


def _cases() -> Iterator[Case]:
    for objective in _OBJECTIVES:
        about = _about_with_parts if objective == _OBJECTIVES[0] else _about
        yield _case("critic", one_pixel(_DEPTHS[0]), _PIXEL, objective, partial(about, objective))
        yield _case("r3gan", partial(discriminators.R3GAN, 8, 16, 32), (2, 3, 8, 8), objective)


CASES = list(_cases())
