"""The trained generator as a file that other programs read."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import tyro

from fastgan.trainer import checkpoint
from fastgan.trainer.config import TrainConfig


@dataclass(frozen=True)
class ExportConfig:
    run: tyro.conf.Positional[Path]  # folder of the run, such as runs/demo
    out: Path | None = None  # unset: generator.safetensors in that folder


def export(config: ExportConfig) -> Path:
    """Write the averaged generator's weights as safetensors, with the run's settings and step as metadata.

    Raises:
        RunFolderError: the folder holds no run.
        CheckpointError: it holds no whole checkpoint.
        OSError: the file cannot be written.
    """
    from safetensors.torch import save

    settings = TrainConfig.load(config.run / "config.json").to_json()
    state, _ = checkpoint.load_newest(config.run / "checkpoints")
    weights = {name: tensor.contiguous().clone() for name, tensor in state["gan"]["ema"]["module"].items()}
    path = config.out or config.run / "generator.safetensors"
    partial = path.with_name(path.name + ".partial")
    metadata = {"format": "pt", "step": str(state["step"]), "config": json.dumps(settings)}
    partial.write_bytes(save(weights, metadata))  # save_file has errors of its own kind
    partial.replace(path)
    return path
