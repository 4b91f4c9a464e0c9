from __future__ import annotations

import dataclasses
import gzip
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from fastgan.trainer.config import PRESETS, ModelConfig, OptimConfig, TrainConfig

WriteIdx = Callable[[Path, np.ndarray], Path]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Use one thread. Networks this small do not gain from more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Use an empty cache folder instead of the user's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "fastgan"


@pytest.fixture
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def write_idx() -> WriteIdx:
    def write(path: Path, array: np.ndarray) -> Path:
        header = struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
        path.write_bytes(gzip.compress(header + array.tobytes()))
        return path

    return write


@pytest.fixture
def fashion_mnist_folder(tmp_path: Path, write_idx: WriteIdx) -> Path:
    """40 random images under Fashion-MNIST's file name."""
    folder = tmp_path / "data"
    folder.mkdir()
    images = np.random.default_rng(0).integers(0, 256, (40, 28, 28), np.uint8)
    write_idx(folder / "train-images-idx3-ubyte.gz", images)
    return folder


@pytest.fixture
def config(tmp_path: Path, fashion_mnist_folder: Path) -> TrainConfig:
    """A run of a tiny DCGAN. It takes a fraction of a second and lasts several epochs."""
    return TrainConfig(
        name="tiny",
        runs=tmp_path / "runs",
        data=fashion_mnist_folder,
        steps=6,
        device="cpu",
        log_every=2,
        sample_every=100,
        checkpoint_every=100,
        model=ModelConfig(width=4, latent_dim=8),
        optim=OptimConfig(batch_size=16),
    )


@pytest.fixture
def ring8_config(tmp_path: Path) -> TrainConfig:
    preset = PRESETS["ring8"][1]
    model = dataclasses.replace(preset.model, width=16)
    return dataclasses.replace(preset, runs=tmp_path / "runs", steps=5, device="cpu", model=model)
