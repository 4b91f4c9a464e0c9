"""Pictures of a run: samples as a grid or a scatter plot, and curves of the losses."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad

from fastgan.trainer.data.drawn import Source
from fastgan.trainer.data.sources import Mixture

SCALE = 2  # enlarge: 32 pixels are small on a screen
MARGIN = 1


def save_samples(samples: Tensor, source: Source, path: Path, columns: int | None = None) -> None:
    """Save a picture of samples.

    Images (N, C, H, W) in [-1, 1] and voxels (N, C, D, H, W), projected along the depth, are drawn as a grid, waveforms
    (N, C, T) as curves, and points (N, 2) over the modes of their source. A grid is square unless `columns` is given.
    """
    if samples.ndim == 5:
        save_grid(samples.amax(2), path, columns)
    elif samples.ndim == 4:
        save_grid(samples, path, columns)
    elif samples.ndim == 3:
        save_waveforms(samples, path)
    else:
        save_points(samples, source, path)


def save_waveforms(waveforms: Tensor, path: Path, shown: int = 16) -> None:
    figure = Figure(figsize=(8, 6))
    for axes, waveform in zip(figure.subplots(4, shown // 4).flat, waveforms, strict=False):
        axes.plot(waveform[0], linewidth=0.8)
        axes.set(ylim=(-1.1, 1.1), xticks=[], yticks=[])
    figure.savefig(path, dpi=120)


def save_grid(images: Tensor, path: Path, columns: int | None = None) -> None:
    grid_of(images, columns).save(path)


def grid_of(images: Tensor, columns: int | None = None) -> Image.Image:
    """Return a picture of images (N, C, H, W) in [-1, 1] in rows; a square unless `columns` is given."""
    columns = columns or math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    blank = columns * rows - len(images)
    pixels = images.clamp(-1, 1).add(1).mul(127.5).round().byte()
    pixels = pad(pixels, (MARGIN, MARGIN, MARGIN, MARGIN, 0, 0, 0, blank))  # (rows * columns, C, H, W)
    channels, height, width = pixels.shape[1:]
    pixels = pixels.view(rows, columns, channels, height, width).permute(0, 3, 1, 4, 2)
    array = pixels.reshape(rows * height, columns * width, channels).numpy()
    image = Image.fromarray(array[..., 0] if channels == 1 else array)
    return image.resize((image.width * SCALE, image.height * SCALE), Image.Resampling.NEAREST)


def as_picture(image: Tensor) -> Image.Image:
    """Convert an image (C, H, W) in [-1, 1]."""
    array = image.clamp(-1, 1).add(1).mul(127.5).round().byte().permute(1, 2, 0).numpy()
    return Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)


def save_points(points: Tensor, source: Source, path: Path) -> None:
    figure = Figure(figsize=(5, 5))  # no pyplot, so no display and no global state
    axes = figure.subplots()
    if isinstance(source, Mixture):
        axes.scatter(source.modes[:, 0], source.modes[:, 1], marker="+", color="tab:red", label="modes", zorder=3)
        extent = 1.3 * float(source.modes.abs().max())
        axes.set(xlim=(-extent, extent), ylim=(-extent, extent))
    axes.scatter(points[:, 0], points[:, 1], s=2, alpha=0.4, color="tab:blue", label="samples")
    axes.set_aspect("equal")
    axes.legend(loc="upper right")
    figure.savefig(path, dpi=120)


def save_losses(metrics: list[dict[str, Any]], path: Path) -> None:
    records = [record for record in metrics if "d_loss" in record]
    steps = [record["step"] for record in records]
    figure = Figure(figsize=(7, 4))
    axes = figure.subplots()
    for key, label in (("d_loss", "discriminator"), ("g_loss", "generator")):
        axes.plot(steps, [record[key] for record in records], label=label)
    axes.set(xlabel="generator step", ylabel="loss")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
