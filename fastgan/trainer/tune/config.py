"""Configuration of a study. The command line can show it without the packages that a study needs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro

from fastgan.trainer.checks import require_seed
from fastgan.trainer.config import PRESETS, TrainConfig
from fastgan.trainer.data.options import PictureConfig


@dataclass(frozen=True)
class TuneConfig:
    preset: tyro.conf.Positional[str] = "ring8"  # preset to tune
    trials: int = 12  # total number of trials, including those that an earlier call finished
    workers: int = 1  # number of processes
    steps: int | None = None  # generator steps of each training run; default: the preset's
    seeds: int = 2  # training runs per trial; their costs are averaged
    sampler: Literal["gp", "tpe"] = "gp"  # gp: for few trials; tpe: for many, and Hyperband stops poor ones early
    extractor: str = "random-conv"  # features for KID, as for fastgan train
    data: Path | None = None  # as for fastgan train
    image_size: int | str | None = None  # as for fastgan train; default: the preset's
    pictures: tyro.conf.OmitArgPrefixes[PictureConfig] = field(default_factory=PictureConfig)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    seed: int = 0
    out: Path = Path("runs/tune")  # folder for the journal, the table, the plot and the best settings

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {self.preset!r}")
        require_seed(self.seed)
        for name in ("trials", "workers", "steps", "seeds"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")

    @property
    def start(self) -> TrainConfig:
        """The settings that the study starts from."""
        preset = PRESETS[self.preset][1]
        return dataclasses.replace(
            preset,
            name=f"{preset.name}-tuned",
            steps=self.steps or preset.steps,
            data=self.data,
            image_size=preset.image_size if self.image_size is None else self.image_size,
            pictures=self.pictures,
            device=self.device,
        )

    def best(self, found: TrainConfig) -> TrainConfig:
        """Return found settings as the start of a run: with the preset's length, not that of a trial."""
        return dataclasses.replace(found, steps=PRESETS[self.preset][1].steps)
