"""Penalties and whole steps of discriminators from tiny to large. fastgan must not slow down any of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from torch import Tensor, nn

from fastgan.bench import architectures, discriminators
from fastgan.bench.case import Case
from fastgan.bench.cases.gradient_penalty import step_case

_ANYWHERE = ("cpu", "cuda")
Make = Callable[[], nn.Module]


class Positions(nn.Module):
    """An MLP per point or token, and a mean over them."""

    def __init__(self, inputs: int, width: int, norm: bool = False) -> None:
        super().__init__()
        layers = [
            part
            for size in (inputs, width)
            for part in (
                nn.Linear(size, width),
                *((nn.LayerNorm(width), nn.GELU()) if norm else (nn.LeakyReLU(0.2),)),
            )
        ]
        self.each, self.head = nn.Sequential(*layers), nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.each(x).mean(1))  # type: ignore[no-any-return]


def norms_alone(make: Callable[[int, int], nn.Module], channels: int, side: int) -> nn.Module:
    """Two normalizations and a linear layer."""
    layers = [part for _ in range(2) for part in (make(channels, side), nn.LeakyReLU(0.2))]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * side * side, 1))


def flat(inputs: int, width: int) -> nn.Module:
    layers = [nn.Linear(inputs, width), nn.LeakyReLU(0.2), nn.Linear(width, width), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.Linear(width, 1))


def spectrogram() -> nn.Module:
    layers = [nn.Conv1d(32, 64, 5, 2, 2), nn.LeakyReLU(0.2), nn.Conv1d(64, 64, 5, 2, 2), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 32, 1))


NORMS: dict[str, Callable[[int, int], nn.Module]] = {
    "instance": lambda channels, side: nn.InstanceNorm2d(channels, affine=True),
    "layer": lambda channels, side: nn.LayerNorm([channels, side, side]),
    "group": lambda channels, side: nn.GroupNorm(4, channels),
    "batch": lambda channels, side: nn.BatchNorm2d(channels),
}
# Names, discriminators, batches, and whether it is given as a function, too.
SIZES: list[tuple[str, Make, tuple[int, ...], bool]] = [
    ("mlp16", partial(discriminators.mlp, 16, 2), (16, 2), True),
    ("mlp256", partial(discriminators.mlp, 256), (64, 2), True),
    ("mlp512", partial(discriminators.mlp, 512), (256, 2), True),
    ("features784", partial(flat, 784, 256), (64, 784), False),
    ("points2048x", partial(Positions, 3, 64), (16, 2048, 3), True),
    ("points64x", partial(Positions, 3, 16), (4, 64, 3), False),
    ("tokens64x", partial(Positions, 32, 64, True), (16, 64, 32), False),
    ("tokens16x", partial(Positions, 32, 8, True), (4, 16, 32), False),
    ("spectrogram32x", spectrogram, (8, 32, 128), False),
    ("conv", partial(discriminators.critic, (3, 8), 4), (4, 3, 4, 4), False),
    ("conv", partial(discriminators.critic, (3, 16, 32), 8), (16, 3, 8, 8), True),
    ("conv", partial(discriminators.critic, (3, 16, 32, 64), 16), (16, 3, 16, 16), True),
    ("conv", partial(discriminators.critic, (3, 32, 64, 128), 32), (16, 3, 32, 32), False),
    ("conv", partial(discriminators.critic, (3, 32, 64, 128, 128), 64), (16, 3, 64, 64), False),
    ("conv", partial(discriminators.critic, (3, 16, 32, 64, 64), 256), (2, 3, 256, 256), False),
    ("u-net", partial(architectures.UNet, 8), (4, 3, 32, 32), True),
    ("u-net", partial(architectures.UNet, 32), (8, 3, 64, 64), False),
    *((f"{name}-norm", partial(norms_alone, norm, 8, 4), (8, 8, 4, 4), False) for name, norm in NORMS.items()),
    *((f"{name}-norm", partial(norms_alone, norm, 32, 32), (16, 32, 32, 32), False) for name, norm in NORMS.items()),
]


def _cases() -> Iterator[Case]:
    for family, make, shape, function in SIZES:
        for objective in ("wgan-gp", "r1", "d-step/r1"):
            for through in (False, True)[: 1 + function]:
                yield step_case(family, make, shape, objective, _ANYWHERE, suite="sizes", function=through)


CASES = list(_cases())
