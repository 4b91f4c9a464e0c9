"""Verification of loss x penalty x minibatch statistic x network: many small games in lockstep, printed as a table."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import get_args

import torch

from fastgan.trainer.config import Architecture, MinibatchStatistic, ModelConfig, OptimConfig
from fastgan.trainer.data.sources import DatasetName, load_source
from fastgan.trainer.game.losses import LossName
from fastgan.trainer.game.regularizer import APPROXIMATE, Kernels, PenaltyName
from fastgan.trainer.gan import GAN
from fastgan.trainer.verify.lockstep import TOLERANCES, Errors, lockstep

NETWORKS: list[tuple[Architecture, DatasetName]] = [
    ("mlp", "ring8"),
    ("pacgan", "ring8"),
    ("dcgan", "waveforms"),
    ("dcgan", "discs"),
    ("dcgan", "voxels"),
    ("resnet", "discs"),
    ("residual", "discs"),
    ("sagan", "discs"),
]
LOSSES: tuple[LossName, ...] = get_args(LossName)
PENALTIES: list[PenaltyName] = [name for name in get_args(PenaltyName) if name not in APPROXIMATE]
STATISTICS: tuple[MinibatchStatistic, ...] = get_args(MinibatchStatistic)


@dataclass(frozen=True)
class Game:
    """A row of the table."""

    architecture: Architecture
    dataset: DatasetName
    loss: LossName
    penalty: PenaltyName
    minibatch: MinibatchStatistic
    pack: int

    def build(self, kernels: Kernels, device: torch.device) -> GAN:
        model = ModelConfig(
            architecture=self.architecture,
            width=8,
            latent_dim=8,
            spectral_norm="none" if self.architecture == "residual" else "fused" if kernels == "fastgan" else "torch",
            minibatch=self.minibatch,
            pack=self.pack,
        )
        optim = OptimConfig(loss=self.loss, penalty=self.penalty, penalty_weight=1.0, batch_size=8, kernels=kernels)
        return GAN(model, optim, load_source(self.dataset, 2, device), 0, device)


def games(quick: bool) -> Iterator[Game]:
    """Yield every pair of penalty and statistic on every network, cycling through the losses; quick: every third game.

    In both cases, every loss, penalty and statistic occurs, on points and on images.
    """
    losses, packs = itertools.cycle(LOSSES), itertools.cycle((1, 1, 2))
    for row, (architecture, dataset) in enumerate(NETWORKS):
        for column, (penalty, minibatch) in enumerate(itertools.product(PENALTIES, STATISTICS)):
            # The statistics vary fastest. A diagonal pairs each penalty with one statistic, another per network.
            if not quick or (column + column // 3 + row) % 3 == 0:
                yield Game(architecture, dataset, next(losses), penalty, minibatch, next(packs))


def verify_matrix(device: torch.device, steps: int, quick: bool) -> bool:
    """Print a row for each game, and return whether all errors are within lockstep.py's tolerances.

    Each row shows the worst relative error of the gradients in float32 and float64, and the largest error of any kind
    as a fraction of its tolerance.
    """
    print(f"{'network':10}{'data':11}{'loss':16}{'penalty':15}{'minibatch':16}pack  float32  float64  of tolerance")
    failed = count = 0
    for game in games(quick):
        found = {dtype: compare(game, device, steps, dtype) for dtype in TOLERANCES}
        breaches = [breach for errors in found.values() for breach in errors.breaches()]
        share = max(error / e.tolerance(kind) for e in found.values() for kind, (error, _) in e.worst.items())
        gradients = "".join(f"{errors.worst['gradient'][0]:9.0e}" for errors in found.values())
        print(
            f"{game.architecture:10}{game.dataset:11}{game.loss:16}{game.penalty:15}{game.minibatch:16}{game.pack:4}"
            f"{gradients}{share:14.1%}{'  FAIL' if breaches else ''}",
            flush=True,
        )
        for breach in breaches:
            print(f"  BREACH {breach}")
        failed += bool(breaches)
        count += 1
    verdict = "FAIL" if failed else "PASS"
    print(f"{verdict}: {count - failed} of {count} games, {steps} step(s) of each in float32 and in float64")
    return not failed


def compare(game: Game, device: torch.device, steps: int, dtype: torch.dtype) -> Errors:
    """Return the worst errors over all steps."""
    total = Errors(dtype)
    exact = game.build("torch", device) if dtype == torch.float32 else None
    for step in lockstep(game.build("torch", device), game.build("fastgan", device), steps, dtype, exact=exact):
        total.include(step.errors)
    return total
