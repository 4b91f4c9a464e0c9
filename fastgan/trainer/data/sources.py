"""Sources of real samples. They need no data loader, live on the device, and resume exactly where they stopped."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgan.trainer.data.drawn import ALL, Drawn, Source
from fastgan.trainer.data.options import DatasetName as DatasetName
from fastgan.trainer.data.options import PictureConfig
from fastgan.trainer.data.size import sides
from fastgan.trainer.errors import DataError

FASHION_MNIST_CLASSES = (
    *("T-shirt", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)

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
        mirror: mirror each image with probability 1/2, anew in each epoch.
        window: (h, w), the size of a random part of each image that is drawn, anew in each epoch; None draws all.
    """

    scale = 1.0
    names: list[str] | None = None  # of all images
    hashes: list[str] | None = None  # of all images
    class_names: list[str] | None = None
    notes: Sequence[str] = ()  # lines about the data, for the user

    def __init__(
        self,
        images: Tensor,
        seed: int,
        device: torch.device,
        labels: Tensor | None = None,
        members: Tensor | None = None,
        *,
        mirror: bool = False,
        window: tuple[int, int] | None = None,
    ) -> None:
        self.device = device
        self.images = images.to(device) if fits(images, device) else images
        self.labels = None if labels is None else labels.long()
        self.classes = None if labels is None else int(labels.max()) + 1
        self.members = torch.arange(len(images), device="cpu") if members is None else members
        self.mirror, self.window = mirror, window
        self.shape = tuple(images.shape[1:] if window is None else (images.shape[1], *window))
        self.generator = torch.Generator().manual_seed(seed)
        self._start_epoch()

    @property
    def size(self) -> int:
        return len(self.members)

    def fork(self, seed: int) -> Images:
        return self._with(self.members, seed)

    def split(self, count: int, seed: int) -> Images:
        """Move `count` images, chosen by `seed`, to a new source. Call this before the first `next`."""
        order = torch.randperm(self.size, generator=torch.Generator().manual_seed(seed), device="cpu")
        return self._move(self.members[order[:count]], self.members[order[count:]], seed)

    def split_names(self, names: Iterable[str], seed: int) -> Images:
        """Move the images with these names to a new source. Call this before the first `next`."""
        wanted = set(names)
        there = [member for member in self.members.tolist() if self.names and self.names[member] in wanted]
        taken = torch.tensor(there, dtype=torch.long, device="cpu")
        return self._move(taken, self.members[~torch.isin(self.members, taken)], seed)

    def _move(self, taken: Tensor, rest: Tensor, seed: int) -> Images:
        other = self._with(taken, seed)
        self.members = rest
        self._start_epoch()
        return other

    def _with(self, members: Tensor, seed: int) -> Images:
        other = copy.copy(self)
        other.members = members
        other.generator = torch.Generator().manual_seed(seed)
        other._start_epoch()
        return other

    def member_names(self) -> list[str]:
        return [self.names[member] for member in self.members.tolist()] if self.names else []

    def _start_epoch(self) -> None:
        self.epoch_state = self.generator.get_state()
        self.order = self.members[torch.randperm(self.size, generator=self.generator, device="cpu")]
        if self.mirror:
            self.mirrored = torch.rand(self.size, generator=self.generator, device="cpu") < 0.5
        if self.window:
            self.corners = torch.rand(2, self.size, generator=self.generator, device="cpu")
        self.cursor = 0

    def next(self, batch_size: int) -> Tensor:
        return self.next_labeled(batch_size)[0]

    def next_labeled(self, batch_size: int, rows: slice = ALL) -> tuple[Tensor, Tensor | None]:
        if batch_size > self.size:
            raise DataError(f"a batch of {batch_size} needs at least {batch_size} images, but the data has {self.size}")
        if self.cursor + batch_size > self.size:
            self._start_epoch()
        batch = slice(self.cursor, self.cursor + batch_size)
        index = self.order[batch][rows]
        self.cursor += batch_size
        labels = None if self.labels is None else self.labels[index].to(self.device)
        pixels = self.images[index.to(self.images.device)]
        if self.window:
            pixels = windows(pixels, self.corners[:, batch][:, rows], self.window)
        pixels = pixels.to(self.device)
        if self.mirror:
            pixels = torch.where(
                self.mirrored[batch][rows].to(self.device)[:, None, None, None], pixels.flip(3), pixels
            )
        return pixels.float().div_(127.5).sub_(1), labels

    def state_dict(self) -> dict[str, Any]:
        return {"epoch_state": self.epoch_state, "cursor": self.cursor}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.generator.set_state(state["epoch_state"])
        self._start_epoch()
        self.cursor = state["cursor"]


def windows(pixels: Tensor, corners: Tensor, size: tuple[int, int]) -> Tensor:
    """Return a part (N, C, h, w) of each image (N, C, H, W). `corners` (2, N) in [0, 1) place them."""
    index = []
    for where, length, whole in zip(corners.to(pixels.device), size, pixels.shape[2:], strict=True):
        start = ((whole - length + 1) * where).long()
        index.append(start[:, None] + torch.arange(length, device=pixels.device))  # (N, length)
    rows = torch.arange(len(pixels), device=pixels.device)[:, None, None, None]
    channels = torch.arange(pixels.shape[1], device=pixels.device)[:, None, None]
    return pixels[rows, channels, index[0][:, None, :, None], index[1][:, None, None, :]]


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
    source = Images(images, seed, device, labels)
    source.class_names = list(FASHION_MNIST_CLASSES) if source.classes == len(FASHION_MNIST_CLASSES) else None
    return source


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
    dataset: DatasetName,
    seed: int,
    device: torch.device,
    folder: Path | None = None,
    image_size: int | str = 32,
    pictures: PictureConfig | None = None,
) -> Source:
    """Load a data set's source of real samples. `image_size` and `pictures` apply to folder and emoji."""
    pictures = pictures or PictureConfig()
    if dataset == "folder":
        return pictures_of(seed, device, folder, image_size, pictures)
    if dataset == "emoji":
        from fastgan.trainer.data.emoji import emoji_pictures, find_emoji

        height, width = sides(image_size)
        if height != width:
            raise ValueError(f"emoji are square: image_size must be one number, got {image_size}")
        found = emoji_pictures(find_emoji(folder), height, pictures.channels)
        emoji = Images(found.images, seed, device, mirror=pictures.mirror)
        emoji.names, emoji.hashes = found.names, found.hashes
        return emoji
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


def pictures_of(
    seed: int, device: torch.device, folder: Path | None, image_size: int | str, pictures: PictureConfig
) -> Images:
    """Return the pictures of a folder or a zip file."""
    from fastgan.trainer.data.image_folder import read_pictures
    from fastgan.trainer.data.pixels import Layout

    if folder is None:
        raise DataError("dataset folder needs a folder of images, or a zip file: pass it with --data PATH")
    layout = Layout(*sides(image_size), pictures.crop, pictures.channels, pictures.background)
    found = read_pictures(folder, layout, pictures.labels, pictures.split)
    window = (layout.height, layout.width) if pictures.crop == "random" else None
    source = Images(found.images, seed, device, found.labels, mirror=pictures.mirror, window=window)
    source.names, source.hashes, source.class_names = found.names, found.hashes, found.class_names
    source.notes = found.notes
    return source
