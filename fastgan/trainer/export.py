"""Export the trained generator to a file that other programs can read, and load it again as a module."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fastgan.trainer import checkpoint
from fastgan.trainer.config import TrainConfig
from fastgan.trainer.errors import CheckpointError, RunFolderError
from fastgan.trainer.models import build_models
from fastgan.trainer.run import make_folder, removed_if_cut_short
from fastgan.trainer.use.config import ExportConfig as ExportConfig


def export(config: ExportConfig) -> Path:
    """Write the averaged generator's weights as safetensors, with the settings, step and data shape as metadata.

    Raises:
        RunFolderError: the folder does not contain a run, or the file's folder cannot be written to.
        CheckpointError: it has no intact checkpoint, or an old version wrote the checkpoint without the data's shape.
        OSError: the file cannot be written.
    """
    settings, state = read_run(config.run)
    check_data(config.run, state)
    path = config.out or home_of(config.run) / "generator.safetensors"
    make_folder(path.parent)
    write_export(path, settings, state["data"], state["step"], state["gan"]["ema"]["module"])
    return path


def home_of(path: Path) -> Path:
    """Return the folder of a run, from that folder or one of its checkpoints; of an exported file, its folder."""
    if path.suffix == ".pt":
        return (path if path.parent.name else path.absolute()).parent.parent
    return path.parent if path.is_file() else path


def read_run(path: Path) -> tuple[TrainConfig, dict[str, Any]]:
    """Return the settings and the state of a run's newest checkpoint, or of the checkpoint `path` (FILE.pt).

    Raises:
        RunFolderError: there is no run.
        CheckpointError: it has no intact checkpoint, or this one is damaged or missing.
    """
    home = home_of(path)
    if path.suffix in (".pt", ".safetensors") and not path.exists():
        raise CheckpointError(f"{path} cannot be read: No such file or directory")
    if path.suffix == ".pt" and not (home / "config.json").is_file():
        raise RunFolderError(f"{path} is not in a run's folder: a checkpoint is RUN/checkpoints/step-N.pt")
    settings = TrainConfig.load(home / "config.json")
    if path.suffix == ".pt":
        return settings, checkpoint.load(path)
    return settings, checkpoint.load_newest(path / "checkpoints")[0]


def check_data(path: Path, state: dict[str, Any]) -> None:
    """Raise CheckpointError if a state lacks the shape of the data, without which no generator can be built."""
    if "data" not in state:
        raise CheckpointError(f"an earlier version wrote {path}: rewrite it with fastgan train --resume")


def write_export(
    path: Path, settings: TrainConfig, data: dict[str, Any], step: int, weights: dict[str, Tensor]
) -> None:
    """Write weights and the settings that rebuild the generator, atomically."""
    from safetensors.torch import save

    weights = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in weights.items()}
    partial = path.with_name(path.name + ".partial")
    about = {"step": step, "config": settings.to_json(), "data": data}
    metadata = {"format": "pt"} | {key: json.dumps(value) for key, value in about.items()}
    with removed_if_cut_short(partial, path):
        partial.write_bytes(save(weights, metadata))  # save_file raises its own kind of errors
        partial.replace(path)


def read_export(path: str | Path) -> tuple[TrainConfig, dict[str, Any], int, dict[str, Tensor]]:
    """Return the settings, the data's shape and classes, the step and the weights of an exported generator.

    Raises:
        OSError: the file does not exist.
        CheckpointError: the file was not written by `export`.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata()
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a safetensors file: {error}") from error
    if not metadata or not {"config", "data", "step"} <= metadata.keys():
        raise CheckpointError(f"{path} was not written by fastgan export")
    config, data, step = (json.loads(metadata[key]) for key in ("config", "data", "step"))
    return TrainConfig.from_json(config), data, step, weights


def load_generator(path: str | Path) -> nn.Module:
    """Load an exported generator. It takes latents (N, latent_dim), and labels (N,) if it is conditional.

    Raises:
        OSError: the file does not exist.
        CheckpointError: the file was not written by `export`.
    """
    settings, data, _, weights = read_export(path)
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
