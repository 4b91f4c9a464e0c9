"""Growth of an op's cost: series in which one size doubles, with the theoretical exponents."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch

from fastgan.bench import discriminators
from fastgan.bench.case import BASELINE, OTHERS, Case, Growth, Make
from fastgan.bench.cases import bias_act, minibatch_discrimination, minibatch_stddev, norm, spectral_norm
from fastgan.bench.steps import batches

Setup = Callable[[torch.device, torch.dtype], dict[str, Make]]
Exponents = Mapping[str, float]

_VARIANTS = (BASELINE, "fastgan")
_LINEAR, _QUADRATIC = {OTHERS: 1.0}, {OTHERS: 2.0}


def _line(
    what: str, op: str | None, size: str, points: Mapping[int, Setup], time: Exponents, peak: Exponents
) -> Iterator[Case]:
    growth = Growth(f"{what} over {size}", size, time, peak)
    for value, setup in points.items():
        yield Case(
            name=f"growth/{what}/{size}={value}",
            op=op,
            dtype=torch.float32,
            device_types=("cpu", "cuda"),
            bytes=None,
            operations=None,
            tolerance=2e-3,
            setup=partial(_without_others, setup),
            suite="growth",
            counted=("peak",),
            family=f"growth/{what}/{size}",
            sizes={size: value},
            growth=growth,
        )


def _without_others(setup: Setup, device: torch.device, dtype: torch.dtype) -> dict[str, Make]:
    return {name: make for name, make in setup(device, dtype).items() if name in _VARIANTS}


def _discrimination() -> Iterator[Case]:
    """Forward and backward around (256, 32, 8). The naive form stores all pairs and does not fit for the largest N."""

    def point(N: int = 256, B: int = 32, C: int = 8) -> Setup:
        return partial(minibatch_discrimination.setup, N, B, C, "forward_backward", naively=True)

    line = partial(_line, "minibatch_discrimination", "minibatch_discrimination")
    pairs = {BASELINE: 2.0, OTHERS: 1.0}
    yield from line("N", {n: point(N=n) for n in (64, 128, 256, 512, 1024, 2048)}, _QUADRATIC, pairs)
    yield from line("B", {b: point(B=b) for b in (8, 16, 32, 64)}, _LINEAR, _LINEAR)
    yield from line("C", {c: point(N=128, C=c) for c in (8, 16, 32, 64)}, _LINEAR, _LINEAR)


def _images() -> Iterator[Case]:
    """Up to the second derivative, by side of the image."""
    line = partial(_line, size="pixels", time=_QUADRATIC, peak=_QUADRATIC)
    for activation in ("leaky_relu", "silu"):
        act = {side: partial(bias_act.setup, activation, shape=(16, 64, side, side)) for side in (16, 32, 64, 128)}
        yield from line(f"bias_act/{activation}", "bias_act", points=act)
    for name in norm.NORMS:
        r1 = {side: partial(norm.r1, name, shape=(16, 64, side, side)) for side in (8, 16, 32, 64)}
        yield from line(f"norm/{name}", name, points=r1)
    stddev = {side: partial(minibatch_stddev.setup, (16, 256, side, side), "r1") for side in (4, 8, 16, 32)}
    yield from line("minibatch_stddev", "minibatch_stddev", points=stddev)
    critic = {side: partial(_penalty, side) for side in (16, 32, 64, 128)}
    yield from line("wgan-gp", None, points=critic)


def _penalty(pixels: int, device: torch.device, dtype: torch.dtype) -> dict[str, Make]:
    """A critic that is fully convolutional except for the last layer."""
    return batches(partial(discriminators.critic, pixels=pixels), (8, 3, pixels, pixels), "wgan-gp", device, dtype)


def _layers() -> Iterator[Case]:
    points = {n: partial(spectral_norm.setup, [(256, 256, 3, 3)] * n, True) for n in (2, 4, 8, 16)}
    yield from _line("spectral_norm", "spectral_norm", "layers", points, _LINEAR, _LINEAR)


CASES = [*_discrimination(), *_layers(), *_images()]
