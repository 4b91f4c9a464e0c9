"""Samples of a trained generator: pictures, a grid, an array, an animated interpolation."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastgan.trainer.device import choose_device
from fastgan.trainer.export import home_of
from fastgan.trainer.report.pictures import as_picture, grid_of
from fastgan.trainer.run import make_folder, removed_if_cut_short
from fastgan.trainer.use.config import GenerateConfig as GenerateConfig
from fastgan.trainer.use.trained import Trained, load_trained, save_picture

MILLISECONDS = 40  # of a frame
STOPS = 4  # latents that an interpolation visits


def generate(config: GenerateConfig) -> list[Path]:
    """Write samples and return the files. The latent of sample number i depends on the seed and i only.

    Raises:
        TrainerError: there is no trained generator.
        ValueError: there is no such class, or the data are not pictures where the flags need some.
    """
    if config.format == "safetensors":
        import_module("safetensors")  # before anything is made: it may be missing
    trained = load_trained(config.run, choose_device(config.device), config.best)
    if config.class_name is not None:
        trained.class_number(config.class_name)
    is_picture = len(trained.data["shape"]) == 3
    if not is_picture and config.format == "png":
        raise ValueError(
            f"samples of shape {tuple(trained.data['shape'])} are no pictures: --format npz writes an array"
        )
    if not is_picture and (config.grid or config.interpolate):
        raise ValueError("grid and interpolate need pictures")
    out = config.out or home_of(config.run) / "generated"
    make_folder(out)
    written: list[Path] = []
    z = config.truncation * trained.latents(config.samples, config.seed)
    labels = trained.labels(config.samples, config.class_name)
    samples = trained.samples(z, labels) if config.samples else torch.empty(0, *trained.data["shape"], device="cpu")
    if is_picture:
        if config.samples:
            remove_samples(out)
        digits = max(4, len(str(config.samples - 1)))
        for number, sample in enumerate(samples):
            written.append(out / f"sample-{number:0{digits}}.png")
            save_picture(as_picture(sample), written[-1])
    if config.format != "png":
        written.append(out / f"samples.{config.format}")
        with removed_if_cut_short(written[-1]):
            write_arrays(written[-1], samples, z, labels, is_picture)
    if size := config.rows_and_columns():
        written.append(out / "grid.png")
        cells = size[0] * size[1]
        z = config.truncation * trained.latents(cells, config.seed)
        save_picture(grid_of(trained.samples(z, trained.labels(cells, config.class_name)), size[1]), written[-1])
    if config.interpolate:
        written.append(out / f"interpolation.{config.animation}")
        frames = interpolation(trained, config, config.interpolate, config.rows_and_columns() or (1, 1))
        with removed_if_cut_short(written[-1]):
            write_animation(written[-1], frames)
    return written


def remove_samples(folder: Path) -> None:
    """Remove the pictures that an earlier call wrote."""
    for path in folder.iterdir():
        if re.fullmatch(r"sample-\d{4,}\.png", path.name):
            path.unlink()


def write_arrays(path: Path, samples: Tensor, z: Tensor, labels: Tensor | None, is_picture: bool) -> None:
    """Write samples, latents and labels to one file. An npz file has pictures as bytes (N, H, W, C).

    A safetensors file has what the generator returned, to the last bit: floats (N, C, H, W), -1 is black, 1 is white.
    """
    named = {"samples": samples, "latents": z} | ({} if labels is None else {"labels": labels})
    if path.suffix == ".safetensors":
        from safetensors.torch import save

        path.write_bytes(save({name: values.contiguous() for name, values in named.items()}))
        return
    if is_picture:
        named["samples"] = samples.clamp(-1, 1).add(1).mul(127.5).round().byte().permute(0, 2, 3, 1)
    np.savez_compressed(path, **{name: values.numpy() for name, values in named.items()})  # type: ignore[arg-type]


def interpolation(
    trained: Trained, config: GenerateConfig, frames: int, size: tuple[int, int]
) -> Iterator[Image.Image]:
    """Yield the frames of a loop through `STOPS` latents for each cell of a grid."""
    rows, columns = size
    cells = rows * columns
    stops = trained.latents(STOPS * cells, config.seed).view(STOPS, cells, -1)
    labels = trained.labels(cells, config.class_name)
    for frame in range(frames):
        where = STOPS * frame / frames
        start = int(where)
        z = spherical(stops[start], stops[(start + 1) % STOPS], where - start)
        yield grid_of(trained.samples(config.truncation * z, labels), columns)


def spherical(start: Tensor, end: Tensor, t: float) -> Tensor:
    """Return the point at `t` in [0, 1] between each pair of latents (N, Z), on a great circle. Lengths change evenly.

    A straight line between two Gaussian vectors passes near the origin, which the generator never sees in training.
    """
    from_length, to_length = (x.norm(dim=1, keepdim=True) for x in (start, end))
    a, b = start / from_length, end / to_length
    angle = (a * b).sum(1, keepdim=True).clamp(-1, 1).acos()
    sine = angle.sin()
    mixed = (((1 - t) * angle).sin() * a + (t * angle).sin() * b) / sine
    direction = torch.where(sine > 1e-4, mixed, a)
    return direction * torch.lerp(from_length, to_length, t)


def write_animation(path: Path, frames: Iterator[Image.Image]) -> None:
    """Write a looped animation in the format of the path's ending."""
    first = next(frames)
    options: dict[str, object] = {"save_all": True, "duration": MILLISECONDS, "loop": 0}
    if path.suffix == ".webp":
        options |= {"quality": 80, "method": 2}
    first.save(path, append_images=frames, **options)  # type: ignore[arg-type]
