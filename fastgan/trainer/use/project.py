"""The latent whose sample is nearest to a picture."""

from __future__ import annotations

import json
import math
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastgan.trainer.data.pixels import UNREADABLE, open_image, pixels_of
from fastgan.trainer.device import choose_device
from fastgan.trainer.errors import DataError, TrainerError, reason
from fastgan.trainer.export import home_of
from fastgan.trainer.measure.extractors import Extractor, check_extractor, label, load_extractor
from fastgan.trainer.measure.quality import measures_images
from fastgan.trainer.report.pictures import as_picture, grid_of
from fastgan.trainer.run import make_folder, removed_if_cut_short, require_writable
from fastgan.trainer.use.config import ProjectConfig
from fastgan.trainer.use.evaluate import layout_of
from fastgan.trainer.use.trained import Trained, load_trained, save_picture, write_json

NOISE = 0.1  # of the latent at the start, so that the search leaves poor minima


class Distance:
    """Mean squared error of pixels plus that of features, each in units of the target's nearest random sample.

    Raises:
        ValueError: no gradient passes through the extractor.
    """

    def __init__(self, target: Tensor, extractor: Extractor) -> None:
        self.target = target
        self.extractor = getattr(extractor, "differentiable", extractor)
        found = self.extractor(target.clone().requires_grad_())
        if not found.requires_grad:
            raise ValueError("no gradient passes through the extractor: choose another one with --extractor")
        self.features = found.detach()
        self.pixel_unit = self.feature_unit = 1.0

    def parts(self, samples: Tensor) -> tuple[Tensor, Tensor]:
        """Return the errors of pixels and of features (N,) each."""
        pixels = (samples - self.target).square().flatten(1).mean(1)
        features = (self.extractor(samples) - self.features).square().mean(1)
        return pixels, features

    def __call__(self, samples: Tensor) -> Tensor:
        pixels, features = self.parts(samples)
        return pixels / self.pixel_unit + features / self.feature_unit


def project(config: ProjectConfig) -> dict[str, Any]:
    """Find the latent, write pictures, the latent and the numbers, and return the numbers.

    Raises:
        TrainerError: there is no trained generator of pictures, or the picture cannot be read.
        ValueError: there is no such class, or no gradient passes through the extractor.
    """
    out = config.out or folder_for(config.picture, home_of(config.run) / "projected")
    trained = load_trained(config.run, choose_device(config.device), config.best)
    shape = tuple(trained.data["shape"])
    if not measures_images(shape):
        raise TrainerError(f"project needs a generator of pictures, but the samples have shape {shape}")
    try:
        pixels = pixels_of(open_image(config.picture.read_bytes()), layout_of(shape, trained.config.pictures))
    except UNREADABLE as error:
        raise DataError(f"{config.picture} cannot be read: {reason(error)}") from error
    target = torch.tensor(pixels).float().div(127.5).sub(1)[None].to(trained.device)
    require_writable(out)
    name = config.extractor or trained.config.extractor
    check_extractor(name, shape, trained.device)
    distance = Distance(target, load_extractor(name, trained.device))
    start, label_of = nearest(trained, distance, config)
    z = optimize_latent(trained, distance, start, label_of, config)

    make_folder(out)
    before, after = (trained.samples(latent, label_of) for latent in (start, z))
    save_picture(grid_of(torch.cat([target.cpu(), before, after]), 3), out / "projection.png")
    save_picture(as_picture(after[0]), out / "projected.png")
    with removed_if_cut_short(out / "latent.npz"):
        np.savez(out / "latent.npz", latent=z.cpu().numpy())
    (pixels_before, features_before), (pixels_after, features_after) = (
        distance.parts(found.to(trained.device)) for found in (before, after)
    )
    numbers = {
        "picture": str(config.picture.resolve()),
        "steps": config.steps,
        "class": None if label_of is None else trained.class_names[int(label_of)],
        "rms_pixel_error": math.sqrt(float(pixels_after)) / 2,
        "rms_pixel_error_at_start": math.sqrt(float(pixels_before)) / 2,
        f"distance-{label(name)}": float(features_after),
        f"distance-{label(name)}_at_start": float(features_before),
        "latent_length": float(z.norm()),
        "out": str(out),
    }
    write_json(out / "projection.json", numbers)
    return numbers


def folder_for(picture: Path, home: Path) -> Path:
    """Return home/<name of the picture>, with -2, -3 ... added where that holds the result of another picture."""
    folders = (home / (picture.stem if number == 1 else f"{picture.stem}-{number}") for number in count(1))
    return next(folder for folder in folders if picture_in(folder) in (None, str(picture.resolve())))


def picture_in(folder: Path) -> str | None:
    """Return the picture whose result the folder holds."""
    try:
        return str(json.loads((folder / "projection.json").read_text(encoding="utf-8"))["picture"])
    except (OSError, ValueError, KeyError, TypeError):  # no result, or one that was cut short
        return None


@torch.no_grad()
def nearest(trained: Trained, distance: Distance, config: ProjectConfig) -> tuple[Tensor, Tensor | None]:
    """Return the nearest of some random latents (1, Z), and its label (1,). It sets the distance's units."""
    z = on_sphere(trained.latents(config.starts, config.seed))  # as the search has them, so that it only gets nearer
    labels = trained.labels(config.starts, config.class_name)
    samples = trained.samples(z, labels)
    parts = [distance.parts(part.to(trained.device)) for part in samples.split(16)]
    pixels, features = (torch.cat([part[index] for part in parts]).cpu() for index in (0, 1))
    distance.pixel_unit, distance.feature_unit = (max(float(error.median()), 1e-12) for error in (pixels, features))
    row = int((pixels / distance.pixel_unit + features / distance.feature_unit).argmin())
    return z[row : row + 1], None if labels is None else labels[row : row + 1]


def optimize_latent(
    trained: Trained, distance: Distance, start: Tensor, labels: Tensor | None, config: ProjectConfig
) -> Tensor:
    """Minimize the distance with Adam on latents of unchanged length, and return the best one (1, Z).

    Gaussian latents all have about the same length, so the search stays where the generator was trained.
    """
    z = start.clone().to(trained.device).requires_grad_()
    noise = torch.Generator().manual_seed(config.seed)
    adam = torch.optim.Adam([z], config.lr)
    best, best_z = math.inf, start
    for step in range(config.steps + 1):
        left = 1 - step / max(config.steps, 1)
        for group in adam.param_groups:
            group["lr"] = config.lr * (0.5 - 0.5 * math.cos(math.pi * min(1.0, 4 * left)))
        size = NOISE * max(0.0, 4 * left - 3) ** 2 if step else 0.0
        jitter = size * torch.randn(z.shape, generator=noise, device="cpu")
        error = distance(trained(on_sphere(z + jitter.to(z.device)), labels)).sum()
        if float(error.detach()) < best and size == 0:
            best, best_z = float(error.detach()), on_sphere(z).detach().clone()
        adam.zero_grad()
        error.backward()
        adam.step()
    return best_z.cpu()


def on_sphere(z: Tensor) -> Tensor:
    """Scale latents (N, Z) to the length sqrt(Z), the usual length of Gaussian ones."""
    scaled: Tensor = z * (math.sqrt(z.shape[1]) / z.norm(dim=1, keepdim=True))
    return scaled
