"""A small classifier that recognizes the modes of stacked images. It is trained once and cached."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import torch
from torch import Tensor, nn

from fastgan.trainer.data.cache import cache_folder
from fastgan.trainer.data.toys import Stacked

STEPS = 400
BATCH = 128


def stacked_modes(samples: Tensor, source: Stacked, cache: Path | None = None) -> Tensor:
    """Count how many of `samples` (N, 3, S, S) fall into each of the 1000 modes (1000,).

    A sample's mode is the combination of its three channels' classes. Metz et al. 2017.
    """
    model = digit_classifier(source.images, source.labels, cache)
    gray = samples.flatten(0, 1)[:, None]  # (3 N, 1, S, S)
    with torch.no_grad():
        classes = torch.cat([model(batch.to(source.device)).argmax(1).cpu() for batch in gray.split(512)])
    a, b, c = classes.view(-1, 3).unbind(1)
    return torch.bincount(100 * a + 10 * b + c, minlength=1000)


def digit_classifier(images: Tensor, labels: Tensor, cache: Path | None = None) -> nn.Module:
    """Return a convolutional classifier of images (N, 1, S, S) uint8 into 10 classes, from `cache` if it is there."""
    model = network(images.shape[-1])
    key = hashlib.sha256(images.cpu().numpy().tobytes() + labels.cpu().numpy().tobytes()).hexdigest()[:16]
    cache = cache or cache_folder()
    path = cache / f"classifier-{key}.pt"
    if path.exists():
        model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    else:
        fit(model, images, labels)
        cache.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}")
        torch.save(model.state_dict(), partial)
        partial.replace(path)
    return model.eval().to(images.device)


def network(size: int) -> nn.Sequential:
    """Two convolutions and a linear layer, always with the same initial weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 32, 5, stride=2, padding=2),
            nn.ReLU(),
            nn.Conv2d(32, 64, 5, stride=2, padding=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64 * (size // 4) ** 2, 10),
        )


def fit(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    generator = torch.Generator().manual_seed(0)
    adam = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(STEPS):
        index = torch.randint(len(images), (BATCH,), generator=generator, device="cpu").to(images.device)
        x = images[index].cpu().float().div(127.5).sub(1)
        loss = nn.functional.cross_entropy(model(x), labels[index].cpu())
        adam.zero_grad()
        loss.backward()
        adam.step()
