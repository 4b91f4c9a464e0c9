"""Settings of the commands that use a trained generator. This module does not import PyTorch."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

with suppress(ModuleNotFoundError):  # only the command line needs it; it reads the annotations
    import tyro

from fastgan.trainer.checks import require_positive, require_seed
from fastgan.trainer.data.options import Channels

LEAST = 10  # fewest samples to compute scores from


@dataclass(frozen=True)
class ExportConfig:
    run: tyro.conf.Positional[Path]  # folder of the run, such as runs/demo, or one of its checkpoints
    out: Path | None = None  # default: generator.safetensors in the run's folder


@dataclass(frozen=True)
class GenerateConfig:
    run: tyro.conf.Positional[Path]  # folder of a run, one of its checkpoints, or a file of fastgan export
    samples: int = 16  # number of samples, each a PNG file
    seed: int = 0
    class_name: Annotated[str | None, tyro.conf.arg(name="class")] = None  # name or number; default: all in turn
    truncation: float = 1.0  # factor of the latents: below 1, samples are more alike
    grid: str | None = None  # also write grid.png of ROWSxCOLUMNS samples, such as 4x8; the interpolation's size too
    interpolate: int | None = None  # also write a looped animation of this many frames
    animation: Literal["webp", "gif"] = "webp"  # its format
    format: Literal["png", "npz", "safetensors"] = "png"  # npz: also bytes (N, H, W, C); safetensors: also floats
    best: bool = False  # the best generator of --score-every instead of the newest
    device: Literal["auto", "cpu", "cuda"] = "auto"
    out: Path | None = None  # folder to write to; default: generated in the run's folder

    def __post_init__(self) -> None:
        require_seed(self.seed)
        if self.samples < 0:
            raise ValueError(f"samples must not be negative, got {self.samples}")
        if self.interpolate is not None and self.interpolate < 2:
            raise ValueError(f"interpolate must be at least 2 frames, got {self.interpolate}")
        if not 0 <= self.truncation < math.inf:
            raise ValueError(f"truncation must be a number that is not negative, got {self.truncation}")
        size = self.rows_and_columns()
        if not (self.samples or size or self.interpolate):
            raise ValueError("there is nothing to write: samples 0 needs grid or interpolate")

    def rows_and_columns(self) -> tuple[int, int] | None:
        if self.grid is None:
            return None
        parts = self.grid.lower().split("x")
        if len(parts) != 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
            raise ValueError(f"grid must be ROWSxCOLUMNS, such as 4x8, got {self.grid!r}")
        return int(parts[0]), int(parts[1])


@dataclass(frozen=True)
class EvaluateConfig:
    run: tyro.conf.Positional[Path | None] = None  # folder of a run, checkpoint or exported file; or --images
    images: Path | None = None  # folder or zip file with samples to score, instead of a run's
    against: Path | None = None  # folder or zip file with real pictures; default: those that the run holds out
    training: bool = False  # score against the pictures that the run trained on
    samples: int = 5000  # number of samples and of real pictures; fewer if there are fewer
    seed: int = 0
    extractor: str | None = None  # a TorchScript file such as inception-2015-12-05.pt, or as for fastgan train
    best: bool = False  # the best generator of --score-every instead of the newest
    image_size: int | str | None = None  # with --images: size to read at; default: that of the first sample
    crop: Literal["center", "none"] | None = None  # with --images: none changes the proportions; default: center
    channels: Channels | None = None  # with --images: 1: gray, 4: with the alpha channel; default: 3
    background: str | None = None  # with --images: color under transparent parts; default: white
    split: str | None = None  # with --against: folder of the split to use, such as val; default: train if there is one
    device: Literal["auto", "cpu", "cuda"] = "auto"
    out: Path | None = None  # file to write; default: evaluation.json in the run's folder

    def __post_init__(self) -> None:
        if (self.run is None) == (self.images is None):
            raise ValueError("evaluate needs the folder of a run, or --images PATH and --against PATH")
        if self.images is not None and self.against is None:
            raise ValueError("--images needs --against PATH, the real pictures")
        if self.training and self.against is not None:
            raise ValueError("training and against exclude each other")
        of_run, of_images = ("training", "best"), ("image_size", "crop", "channels", "background")
        if given := [name for name in of_images if self.run and getattr(self, name) is not None]:
            raise ValueError(f"{', '.join(given)}: only for --images; pictures are read as the run reads its own")
        if given := [name for name in of_run if self.images and getattr(self, name)]:
            raise ValueError(f"{', '.join(given)}: only for a run, not for --images")
        if self.split is not None and self.against is None:
            raise ValueError("split selects a part of the pictures of --against PATH, which is missing")
        require_seed(self.seed)
        if self.samples < LEAST:
            raise ValueError(f"samples must be at least {LEAST}, got {self.samples}")


@dataclass(frozen=True)
class ProjectConfig:
    run: tyro.conf.Positional[Path]  # folder of a run, one of its checkpoints, or a file of fastgan export
    picture: tyro.conf.Positional[Path]  # picture to find the latent of
    class_name: Annotated[str | None, tyro.conf.arg(name="class")] = None  # default: the class that fits best
    steps: int = 300
    starts: int = 256  # random latents, of which the nearest one is the start
    lr: float = 0.05
    extractor: str | None = None  # features of the perceptual distance; default: the run's
    seed: int = 0
    best: bool = False  # the best generator of --score-every instead of the newest
    device: Literal["auto", "cpu", "cuda"] = "auto"
    out: Path | None = None  # folder to write to; default: projected/<name of the picture> in the run's folder

    def __post_init__(self) -> None:
        require_seed(self.seed)
        require_positive(self, "starts", "lr")
        if self.steps < 0:
            raise ValueError(f"steps must not be negative, got {self.steps}")
