"""The trained generator as a file that other programs read, and from there as a module again."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import tyro
from torch import nn

from fastgan.trainer import checkpoint
from fastgan.trainer.config import TrainConfig
from fastgan.trainer.errors import CheckpointError
from fastgan.trainer.models import build_models


@dataclass(frozen=True)
class ExportConfig:
    run: tyro.conf.Positional[Path]  # folder of the run, such as runs/demo
    out: Path | None = None  # unset: generator.safetensors in that folder


def export(config: ExportConfig) -> Path:
    """Write the averaged generator's weights as safetensors; the settings, the step and the data's shape are metadata.

    Raises:
        RunFolderError: the folder holds no run.
        CheckpointError: it holds no whole checkpoint, or one of before it said what the data are like.
        OSError: the file cannot be written.
    """
    from safetensors.torch import save

    settings = TrainConfig.load(config.run / "config.json").to_json()
    state, _ = checkpoint.load_newest(config.run / "checkpoints")
    if "data" not in state:
        raise CheckpointError(f"{config.run} is of an earlier version: fastgan train --resume writes it anew")
    weights = {name: tensor.contiguous().clone() for name, tensor in state["gan"]["ema"]["module"].items()}
    path = config.out or config.run / "generator.safetensors"
    partial = path.with_name(path.name + ".partial")
    about = {"step": state["step"], "config": settings, "data": state["data"]}
    metadata = {"format": "pt"} | {key: json.dumps(value) for key, value in about.items()}
    partial.write_bytes(save(weights, metadata))  # save_file has errors of its own kind
    partial.replace(path)
    return path


def load_generator(path: str | Path) -> nn.Module:
    """The generator of such a file: of latents (N, latent_dim), and labels (N,) where it knows classes.

    Raises:
        OSError: there is no such file.
        KeyError: `export` did not write it.
    """
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    settings, data = TrainConfig.from_json(json.loads(metadata["config"])), json.loads(metadata["data"])
    generator, _ = build_models(tuple(data["shape"]), data["scale"], settings.model, data["classes"])
    generator.load_state_dict(weights)
    return generator.eval().requires_grad_(False)


def how_to_load(path: Path) -> str:
    """A line of Python that makes samples by an exported file."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    model, classes = json.loads(metadata["config"])["model"], json.loads(metadata["data"])["classes"]
    labels = f", torch.arange(16) % {classes}" if classes else ""
    imports = "import torch; from fastgan.trainer.export import load_generator"
    return f"{imports}; load_generator({str(path)!r})(torch.randn(16, {model['latent_dim']}){labels})"
