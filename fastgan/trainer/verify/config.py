"""Settings of a verification. This module does not import PyTorch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fastgan.trainer.checks import require_seed, require_threads
from fastgan.trainer.config import PRESETS, Architecture, MinibatchStatistic, ModelConfig, OptimConfig
from fastgan.trainer.data.options import DatasetName, refuse_data
from fastgan.trainer.game.names import APPROXIMATE, LossName, PenaltyName


@dataclass(frozen=True)
class VerifyConfig:
    dataset: DatasetName = "discs"  # training data; discs needs no files
    data: Path | None = None  # folder with Fashion-MNIST's files, as for fastgan train
    loss: LossName | None = None  # default: the preset's
    penalty: PenaltyName | None = None  # default: the preset's
    minibatch: MinibatchStatistic | None = None  # default: the preset's
    architecture: Architecture | None = None  # default: the preset's
    steps: int = 32
    timed_steps: int = 20  # per variant; the variants take turns
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = None  # CPU threads; default: PyTorch's choice
    backend: Literal["auto", "reference", "cpu", "triton", "cuda"] = "auto"  # backend of the fused copy
    compile: bool = False  # compile the fused copy with torch.compile (needs a C++ compiler)
    matrix: bool = False  # verify small games of every loss, penalty, minibatch statistic and network instead
    quick: bool = False  # with --matrix: only a third of the games, one step each
    out: Path | None = None  # folder to write verify.json to, for example runs/demo

    def __post_init__(self) -> None:
        require_seed(self.seed)
        require_threads(self.threads)
        refuse_data(self.dataset, self.data)
        for name in ("steps", "timed_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.quick and not self.matrix:
            raise ValueError("quick needs matrix: it selects a third of the matrix")
        if self.penalty in APPROXIMATE:
            raise ValueError(
                f"penalty {self.penalty} is an approximation whose rounding exceeds the tolerances: choose an exact one"
            )
        if self.matrix:
            kept = ("device", "threads", "backend", "matrix", "quick")
            others = [f for f in dataclasses.fields(self) if f.name not in kept]
            given = [f.name for f in others if getattr(self, f.name) != f.default]
            if given:
                raise ValueError(f"matrix defines its own games: leave out {', '.join(given)}")

    @property
    def optim(self) -> OptimConfig:
        preset = PRESETS[self.dataset][1].optim
        loss, penalty = self.loss or preset.loss, self.penalty or preset.penalty
        return dataclasses.replace(preset, loss=loss, penalty=penalty, compile=self.compile)

    @property
    def model(self) -> ModelConfig:
        preset = PRESETS[self.dataset][1].model
        architecture = self.architecture or preset.architecture
        return dataclasses.replace(
            preset,
            architecture=architecture,
            minibatch=self.minibatch or preset.minibatch,
            spectral_norm="none" if architecture == "residual" else preset.spectral_norm,
        )
