"""What a study is made of, for the command line to show without the packages that a study needs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from fastgan.trainer.config import PRESETS, TrainConfig


@dataclass(frozen=True)
class TuneConfig:
    preset: tyro.conf.Positional[str] = "ring8"  # whose settings are tuned
    trials: int = 12  # in all; those that an earlier call finished count
    workers: int = 1  # processes
    steps: int | None = None  # generator steps of each training; unset: the preset's
    seeds: int = 2  # trainings of each trial, whose costs are averaged
    sampler: Literal["gp", "tpe"] = "gp"  # gp: few trials; tpe: many, with the unpromising stopped by Hyperband
    extractor: str = "random-conv"  # features of the KID, as for fastgan train
    data: Path | None = None  # as for fastgan train
    device: Literal["auto", "cpu", "cuda"] = "auto"
    seed: int = 0
    out: Path = Path("runs/tune")  # folder of the journal, the table, the plot and the best settings

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {self.preset!r}")
        for name in ("trials", "workers", "steps", "seeds"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")

    @property
    def start(self) -> TrainConfig:
        """The settings to improve on."""
        preset = PRESETS[self.preset][1]
        steps = self.steps or preset.steps
        return dataclasses.replace(preset, name=f"{preset.name}-tuned", steps=steps, data=self.data, device=self.device)
