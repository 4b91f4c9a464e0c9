from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastgan.trainer.config import PRESETS, TrainConfig
from fastgan.trainer.data.options import PictureConfig
from fastgan.trainer.loop import Trainer


def write_pictures(folder: Path, count: int, seed: int = 0, shift: int = 0) -> Path:
    """Smooth random pictures in two classes."""
    draw = np.random.default_rng(seed)
    for i in range(count):
        path = folder / ("cat" if i % 2 else "dog") / f"{i:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        values = draw.integers(0, 200, (4, 4, 3)) + shift
        Image.fromarray(values.astype(np.uint8)).resize((32, 16), Image.Resampling.BICUBIC).save(path)
    return folder


@pytest.fixture
def config(tmp_path) -> TrainConfig:
    """A run on 120 pictures of two classes, 16x32."""
    preset = PRESETS["folder"][1]
    return dataclasses.replace(
        preset,
        runs=tmp_path / "runs",
        data=write_pictures(tmp_path / "data", 120),
        image_size="16x32",
        device="cpu",
        steps=3,
        log_every=1,
        equilibrium_every=None,
        pictures=PictureConfig(),
        model=dataclasses.replace(preset.model, width=4, latent_dim=8, conditional=True),
        optim=dataclasses.replace(preset.optim, batch_size=8),
    )


@pytest.fixture
def run(config, monkeypatch) -> Trainer:
    monkeypatch.setattr(Trainer, "_summarize", lambda trainer: None)
    trainer = Trainer(config)
    trainer.train()
    return trainer
