"""Export the trained generator to a file that other programs can read, and load it again as a module."""

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
    out: Path | None = None  # default: generator.safetensors in the run's folder


def export(config: ExportConfig) -> Path:
    """Write the averaged generator's weights as safetensors, with the settings, step and data shape as metadata.

    Raises:
        RunFolderError: the folder does not contain a run.
        CheckpointError: it has no intact checkpoint, or an old version wrote the checkpoint without the data's shape.
        OSError: the file cannot be written.
    """
    from safetensors.torch import save

    settings = TrainConfig.load(config.run / "config.json").to_json()
    state, _ = checkpoint.load_newest(config.run / "checkpoints")
    if "data" not in state:
        raise CheckpointError(f"an earlier version wrote {config.run}: rewrite it with fastgan train --resume")
    weights = {name: tensor.contiguous().clone() for name, tensor in state["gan"]["ema"]["module"].items()}
    path = config.out or config.run / "generator.safetensors"
    partial = path.with_name(path.name + ".partial")
    about = {"step": state["step"], "config": settings, "data": state["data"]}
    metadata = {"format": "pt"} | {key: json.dumps(value) for key, value in about.items()}
    partial.write_bytes(save(weights, metadata))  # save_file raises its own kind of errors
    partial.replace(path)
    return path


def load_generator(path: str | Path) -> nn.Module:
    """Load an exported generator. It takes latents (N, latent_dim), and labels (N,) if it is conditional.

    Raises:
        OSError: the file does not exist.
        KeyError: the file was not written by `export`.
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
    """Return a line of Python that generates samples with an exported file."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    model, classes = json.loads(metadata["config"])["model"], json.loads(metadata["data"])["classes"]
    labels = f", torch.arange(16) % {classes}" if classes else ""
    imports = "import torch; from fastgan.trainer.export import load_generator"
    return f"{imports}; load_generator({str(path)!r})(torch.randn(16, {model['latent_dim']}){labels})"
