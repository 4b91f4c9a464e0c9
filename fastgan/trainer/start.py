"""The weights that a fine-tuned run starts from: those of another run, or of an exported generator."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from fastgan.trainer.config import TrainConfig
from fastgan.trainer.export import read_export, read_run
from fastgan.trainer.gan import GAN

PROBLEMS = 12  # weights that do not fit, to name
WRAPPED = "generator."  # start of the names of a generator that takes labels


def start_from(gan: GAN, config: TrainConfig, path: Path, quiet: bool = False) -> None:
    """Copy the weights of a run's folder or of an exported file as far as they fit, and print those that do not.

    Raises:
        RunFolderError, CheckpointError, OSError: there is no such run or file.
        ValueError: no weight of the generator fits.
    """
    if path.is_file() and path.suffix != ".pt":
        other, _, _, generator = read_export(path)
        discriminator = None
    else:
        other, state = read_run(path)
        generator, discriminator = state["gan"]["ema"]["module"], state["gan"]["discriminator"]
    own = gan.generator.state_dict()
    generator = under_names_of(own, generator)
    weights = {name: tensor for name, tensor in own.items() if tensor.ndim > 1}  # not biases
    if not any(name in generator and generator[name].shape == tensor.shape for name, tensor in weights.items()):
        raise ValueError(f"no weights of {path} fit these networks: {differences(other, config)}")
    torch.manual_seed(4 * config.seed)  # loading a checkpoint has set the random state
    problems = gan.start_from(generator, discriminator)
    if quiet:
        return
    if problems:
        print(f"starting from {path} as far as tensors fit ({differences(other, config)}); these do not:")
    else:
        print(f"starting from {path}: all tensors fit")
    for line in problems[:PROBLEMS]:
        print(f"  {line}")
    if len(problems) > PROBLEMS:
        print(f"  and {len(problems) - PROBLEMS} more")
    if discriminator is None:
        frozen = f", also those that --freeze-d {config.optim.freeze_d} keeps" if config.optim.freeze_d else ""
        print(f"  the file has no discriminator: its weights are new{frozen}")


def under_names_of(own: Mapping[str, Tensor], weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of a generator with labels under the names of one without, or the other way round."""
    labeled, wanted = (any(name.startswith(WRAPPED) for name in names) for names in (weights, own))
    if labeled == wanted:
        return weights
    return {WRAPPED + name if wanted else name.removeprefix(WRAPPED): tensor for name, tensor in weights.items()}


def differences(other: TrainConfig, config: TrainConfig) -> str:
    """Say which settings of the networks differ."""

    def settings(of: TrainConfig) -> dict[str, object]:
        return {"image_size": of.image_size, "channels": of.pictures.channels} | dataclasses.asdict(of.model)

    there, here = settings(other), settings(config)
    found = [f"{name} was {there[name]} and is {here[name]}" for name in here if here[name] != there[name]]
    return ", ".join(found) or "the data have other shapes or classes"
