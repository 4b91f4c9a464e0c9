"""Sources of real samples. They need no data loader, live on the device, and resume exactly where they stopped."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fastgan.trainer.data.drawn import ALL, Drawn, Source
from fastgan.trainer.errors import DataError

DatasetName = Literal["fashion-mnist", "stacked", "folder", "emoji", "discs", "waveforms", "voxels", "ring8", "grid25"]

FASHION_MNIST_IMAGES = "train-images-idx3-ubyte.gz"
FASHION_MNIST_LABELS = "train-labels-idx1-ubyte.gz"
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")


class Images:
    """Images (N, C, H, W) in unsigned bytes, scaled to [-1, 1] on the device as they are drawn.

    Images move to the device if they need at most half of its free memory. Images of a memory-mapped file stay in the
    file, and only the drawn ones are read. Each epoch visits every image at most once, in an order drawn from `seed`;
    a last incomplete batch is dropped.

    Args:
        images: (N, C, H, W) uint8.
        labels: (N,), or None.
        members: indices of the images to use; None uses all.
    """

    scale = 1.0

    def __init__(
        self,
        images: Tensor,
        seed: int,
        device: torch.device,
        labels: Tensor | None = None,
        members: Tensor | None = None,
    ) -> None:
        self.device = device
        self.images = images.to(device) if fits(images, device) else images
        self.labels = None if labels is None else labels.long()
        self.classes = None if labels is None else int(labels.max()) + 1
        self.members = torch.arange(len(images), device="cpu") if members is None else members
        self.shape = tuple(images.shape[1:])
        self.generator = torch.Generator().manual_seed(seed)
        self._start_epoch()

    @property
    def size(self) -> int:
        return len(self.members)

    def fork(self, seed: int) -> Images:
        return Images(self.images, seed, self.device, self.labels, self.members)

    def split(self, count: int, seed: int) -> Images:
        """Move `count` images, chosen by `seed`, to a new source. Call this before the first `next`."""
        order = torch.randperm(self.size, generator=torch.Generator().manual_seed(seed), device="cpu")
        taken = Images(self.images, seed, self.device, self.labels, self.members[order[:count]])
        self.members = self.members[order[count:]]
        self._start_epoch()
        return taken

    def _start_epoch(self) -> None:
        self.epoch_state = self.generator.get_state()
        self.order = self.members[torch.randperm(self.size, generator=self.generator, device="cpu")]
        self.cursor = 0

    def next(self, batch_size: int) -> Tensor:
        return self.next_labeled(batch_size)[0]

    def next_labeled(self, batch_size: int, rows: slice = ALL) -> tuple[Tensor, Tensor | None]:
        if batch_size > self.size:
            raise DataError(f"a batch of {batch_size} needs at least {batch_size} images, but the data has {self.size}")
        if self.cursor + batch_size > self.size:
            self._start_epoch()
        index = self.order[self.cursor : self.cursor + batch_size][rows]
        self.cursor += batch_size
        labels = None if self.labels is None else self.labels[index].to(self.device)
        pixels = self.images[index.to(self.images.device)].to(self.device)
        return pixels.float().div_(127.5).sub_(1), labels

    def state_dict(self) -> dict[str, Any]:
        return {"epoch_state": self.epoch_state, "cursor": self.cursor}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.generator.set_state(state["epoch_state"])
        self._start_epoch()
        self.cursor = state["cursor"]


def fits(images: Tensor, device: torch.device) -> bool:
    return device.type != "cuda" or images.numel() <= torch.cuda.mem_get_info(device)[0] // 2


class Mixture(Drawn):
    """A mixture of equally likely Gaussians with standard deviation `sigma` around `modes` (K, 2)."""

    shape: tuple[int, ...] = (2,)

    def __init__(self, modes: Tensor, sigma: float, seed: int, device: torch.device) -> None:
        super().__init__(seed, device)
        self.modes = modes
        self.scale = float(modes.abs().max())
        self.classes = len(modes)
        self.sigma = sigma

    def draw(self, count: int) -> tuple[Tensor, Tensor | None]:
        mode = torch.randint(len(self.modes), (count,), generator=self.generator, device="cpu")
        offset = torch.randn(count, 2, generator=self.generator, device="cpu")
        return self.modes[mode] + self.sigma * offset, mode

    def shares(self, samples: Tensor, radius: float) -> Tensor:
        """Return the fraction of `samples` (N, 2) within `radius` of each mode (K,)."""
        distance = torch.cdist(samples.cpu(), self.modes)  # (N, K)
        return (distance <= radius).float().mean(0)


class Discs(Drawn):
    """Soft bright discs of random position and size on a dark background: images (1, 32, 32) in [-1, 1]."""

    shape: tuple[int, ...] = (1, 32, 32)
    scale = 1.0

    def draw(self, count: int) -> tuple[Tensor, Tensor | None]:
        x, y, radius = torch.rand(3, count, 1, 1, generator=self.generator, device="cpu")
        axis = torch.arange(32.0, device="cpu")
        distance = torch.hypot(axis - (8 + 16 * x), axis[:, None] - (8 + 16 * y))  # (N, 32, 32)
        return torch.tanh(4 + 4 * radius - distance)[:, None], None


def ring8(seed: int, device: torch.device) -> Mixture:
    """Eight modes on the unit circle, sigma 0.01."""
    angle = torch.arange(8, device="cpu") * (2 * math.pi / 8)
    return Mixture(torch.stack([angle.cos(), angle.sin()], 1), 0.01, seed, device)


def grid25(seed: int, device: torch.device) -> Mixture:
    """25 modes on {-4, -2, 0, 2, 4}^2, sigma 0.05."""
    axis = torch.arange(-4.0, 5.0, 2.0, device="cpu")
    return Mixture(torch.cartesian_prod(axis, axis), 0.05, seed, device)


def fashion_mnist(seed: int, device: torch.device, folder: Path | None = None) -> Images:
    """Fashion-MNIST's training images, padded from 28x28 to 32x32."""
    images, labels = read_fashion_mnist(find_fashion_mnist(folder))
    return Images(images, seed, device, labels)


def read_fashion_mnist(folder: Path) -> tuple[Tensor, Tensor | None]:
    """Return images (N, 1, 32, 32) and labels (N,), or None if the label file is missing.

    The images are unpacked once, then mapped from the cache until the file changes.
    """
    from fastgan.trainer.data.cache import cache_path, kept, stamp
    from fastgan.trainer.data.idx import read_idx

    path = folder / FASHION_MNIST_IMAGES
    pixels = kept(cache_path("fashion-mnist-32", *stamp(path)), partial(padded_images, path))
    images = torch.from_numpy(pixels).view(-1, 1, 32, 32)
    path = folder / FASHION_MNIST_LABELS
    if not path.exists():
        return images, None
    labels = read_idx(path)
    if labels.shape != (len(images),):
        raise DataError(f"{path} has shape {labels.shape}, expected ({len(images)},)")
    return images, torch.tensor(labels, device="cpu").long()


def padded_images(path: Path) -> Iterator[bytes]:
    """Pad the images (N, 28, 28) of an IDX file to (N, 32, 32), in one part."""
    from fastgan.trainer.data.idx import read_idx

    images = read_idx(path)
    if images.ndim != 3 or images.shape[1:] != (28, 28):
        raise DataError(f"{path} has shape {images.shape}, expected (N, 28, 28)")
    padded = torch.zeros(len(images), 32, 32, dtype=torch.uint8, device="cpu")
    padded[:, 2:30, 2:30] = torch.tensor(images, device="cpu")
    yield padded.numpy().tobytes()


def stacked(seed: int, device: torch.device, folder: Path | None = None) -> Source:
    """Fashion-MNIST images stacked in threes."""
    from fastgan.trainer.data.toys import Stacked

    folder = find_fashion_mnist(folder)
    images, labels = read_fashion_mnist(folder)
    if labels is None:
        raise DataError(f"no {FASHION_MNIST_LABELS} in {folder}: stacked images need the labels")
    return Stacked(images, labels, seed, device)


def find_fashion_mnist(folder: Path | None = None) -> Path:
    """Find the folder of Fashion-MNIST's IDX files: `folder`, $FASTGAN_DATA, the cache, or Debian's folder.

    If `folder` or $FASTGAN_DATA is set and lacks the file, that is an error; no other folder is searched.
    """
    from fastgan.trainer.data.cache import cache_folder

    named = folder or (Path(value) if (value := os.environ.get("FASTGAN_DATA")) else None)
    candidates = [named] if named else [cache_folder() / "fashion-mnist", DEBIAN_FOLDER]
    for candidate in candidates:
        if (candidate / FASHION_MNIST_IMAGES).is_file():
            return candidate
    raise DataError(
        f"no {FASHION_MNIST_IMAGES} in {' or '.join(map(str, candidates))}; pass its folder with --data PATH "
        "or FASTGAN_DATA=PATH, download it with `make data`, or install Debian's package dataset-fashion-mnist"
    )


def load_source(
    dataset: DatasetName, seed: int, device: torch.device, folder: Path | None = None, image_size: int = 32
) -> Source:
    """Load a data set's source of real samples. `image_size` applies to data without a fixed size."""
    if dataset == "folder":
        from fastgan.trainer.data.image_folder import read_folder

        if folder is None:
            raise DataError("dataset folder needs a folder of images: pass it with --data PATH")
        images, labels = read_folder(folder, image_size)
        return Images(images, seed, device, labels)
    if dataset == "emoji":
        from fastgan.trainer.data.emoji import find_emoji, read_emoji

        return Images(read_emoji(find_emoji(folder), image_size), seed, device)
    if dataset == "fashion-mnist":
        return fashion_mnist(seed, device, folder)
    if dataset == "stacked":
        return stacked(seed, device, folder)
    if dataset == "waveforms" or dataset == "voxels":
        from fastgan.trainer.data.toys import Voxels, Waveforms

        return (Waveforms if dataset == "waveforms" else Voxels)(seed, device)
    if dataset == "discs":
        return Discs(seed, device)
    return {"ring8": ring8, "grid25": grid25}[dataset](seed, device)
