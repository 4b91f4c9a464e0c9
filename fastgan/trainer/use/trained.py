"""A trained generator, from a run's folder or an exported file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from fastgan import strict_json
from fastgan.trainer.config import TrainConfig
from fastgan.trainer.errors import RunFolderError
from fastgan.trainer.export import check_data, home_of, read_export, read_run
from fastgan.trainer.models import build_models
from fastgan.trainer.run import removed_if_cut_short, replace_text

BATCH = 64


@dataclass
class Trained:
    """An averaged generator with the settings and the data that it was trained on."""

    config: TrainConfig
    data: dict[str, Any]  # shape, scale, classes, class_names, digest
    step: int
    generator: nn.Module
    device: torch.device

    @property
    def classes(self) -> int | None:
        found: int | None = self.data["classes"]
        return found

    @property
    def class_names(self) -> list[str]:
        names: list[str] | None = self.data.get("class_names")
        return names or [str(number) for number in range(self.classes or 0)]

    def class_number(self, name: str) -> int:
        """Return the number of a class from its name or number.

        Raises:
            ValueError: there is no such class, or the generator takes no labels.
        """
        if self.classes is None:
            raise ValueError("this generator takes no labels: it was trained without --conditional")
        if name in self.class_names:
            return self.class_names.index(name)
        if name.isdecimal() and int(name) < self.classes:
            return int(name)
        raise ValueError(f"no class {name!r}: choose from {', '.join(self.class_names)}")

    def latents(self, count: int, seed: int) -> Tensor:
        """Draw latents (count, latent_dim). The first ones are the same for every count."""
        length, generator = self.config.model.latent_dim, torch.Generator().manual_seed(seed)
        # One draw of all numbers would give other numbers for other counts.
        drawn = [torch.randn(length, generator=generator, device="cpu") for _ in range(count)]
        return torch.stack(drawn) if drawn else torch.empty(0, length, device="cpu")

    def labels(self, count: int, name: str | None = None) -> Tensor | None:
        """Return labels (count,) of one class, or of all classes in turn; None without classes."""
        if name is not None:
            return torch.full((count,), self.class_number(name), device="cpu")
        return None if self.classes is None else torch.arange(count, device="cpu") % self.classes

    def __call__(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return samples (N, *S) of latents (N, latent_dim). Gradients pass."""
        args = () if self.classes is None or labels is None else (labels.to(self.device),)
        samples: Tensor = self.generator(z.to(self.device), *args)
        return samples

    @torch.no_grad()
    def samples(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """Compute samples in batches, on the CPU in the end."""
        labels = self.labels(len(z)) if labels is None else labels
        parts = [slice(start, start + BATCH) for start in range(0, len(z), BATCH)]
        return torch.cat([self(z[part], None if labels is None else labels[part]).cpu() for part in parts])


def load_trained(path: Path, device: torch.device, best: bool = False) -> Trained:
    """Load the averaged generator of a run's newest checkpoint, of one checkpoint, its best one, or an exported file.

    Raises:
        RunFolderError: there is no run.
        CheckpointError: it has no intact checkpoint, or one without the data's shape.
    """
    if best:
        path = home_of(path) / "best.safetensors"
        if not path.is_file():
            raise RunFolderError(f"{path} does not exist: train with --score-every to keep the best generator")
    if path.is_file() and path.suffix != ".pt":
        config, data, step, weights = read_export(path)
    else:
        config, state = read_run(path)
        check_data(path, state)
        data, step, weights = state["data"], state["step"], state["gan"]["ema"]["module"]
    generator, _ = build_models(tuple(data["shape"]), data["scale"], config.model, data["classes"])
    generator.load_state_dict(weights)
    return Trained(config, data, step, generator.eval().requires_grad_(False).to(device), device)


def save_picture(picture: Image.Image, path: Path) -> None:
    with removed_if_cut_short(path):
        picture.save(path)


def write_json(path: Path, values: dict[str, Any]) -> None:
    replace_text(path, strict_json.dumps(values, indent=2) + "\n")
