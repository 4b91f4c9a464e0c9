from __future__ import annotations

import dataclasses
import shutil
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


def config_in(folder: Path) -> TrainConfig:
    """A run on 120 pictures of two classes, 16x32."""
    preset = PRESETS["folder"][1]
    return dataclasses.replace(
        preset,
        runs=folder / "runs",
        data=folder / "data",
        image_size="16x32",
        device="cpu",
        steps=3,
        log_every=1,
        equilibrium_every=None,
        pictures=PictureConfig(),
        model=dataclasses.replace(preset.model, width=4, latent_dim=8, conditional=True),
        optim=dataclasses.replace(preset.optim, batch_size=8),
    )


@pytest.fixture(scope="session")
def trained_once(tmp_path_factory) -> tuple[Path, Trainer]:
    """The data and the run of all tests here."""
    folder = tmp_path_factory.mktemp("use")
    write_pictures(folder / "data", 120)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        patch.setattr(Trainer, "_summarize", lambda trainer: None)
        trainer = Trainer(config_in(folder))
        trainer.train()
    return folder, trainer


@pytest.fixture
def config(tmp_path, trained_once) -> TrainConfig:
    shutil.copytree(trained_once[0] / "data", tmp_path / "data")
    return config_in(tmp_path)


@pytest.fixture
def run(config, trained_once) -> Trainer:
    """A copy of the run in the test's own folder."""
    folder, trainer = trained_once
    shutil.copytree(folder / "runs", config.runs)
    saved = config.folder / "config.json"
    saved.write_text(saved.read_text().replace(str(folder), str(config.runs.parent)))
    return trainer
