"""Augmentation of the discriminator's inputs, for both reals and fakes, when data is scarce.

DiffAugment (Zhao et al. 2020) changes every image. ADA (Karras et al. 2020) makes each change with a probability p,
which it adapts to how confident the discriminator is on training images. ADA omits cutout, because its authors got the
best results without it. Each change is affine in the image (it multiplies, adds, or moves whole pixels), so it can be
differentiated any number of times. Penalties use the gradient with respect to the augmented images.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastgan.trainer.game.names import AugmentName as AugmentName

EVERY = 4  # batches between updates of p
SHIFT, CUT = 1 / 8, 1 / 2  # as fractions of a side: the largest translation, and the side of the cutout square


class Augment:
    """Augments images (N, C, H, W) with random numbers from the caller, so that every device gets the same result.

    Args:
        kind: "none", "diffaugment", or "ada".
        images_to_one: images over which ADA's p can rise from 0 to 1.
        target: target of E[sign D(real)]; ADA raises p above it.
    """

    def __init__(
        self, kind: AugmentName, device: torch.device, images_to_one: int = 500_000, target: float = 0.6
    ) -> None:
        self.kind, self.images_to_one, self.target = kind, images_to_one, target
        # p stays on the device, so that nothing waits for it.
        self.p = torch.full((), 1.0 if kind == "diffaugment" else 0.0, device=device)
        self.signs = torch.zeros((), device=device)  # sum over the reals since the last update
        self.seen = self.batches = 0

    def __call__(self, x: Tensor, u: Tensor | None) -> Tensor:
        """
        Args:
            x: (N, C, H, W).
            u: (N, 6, 3), uniform in [0, 1): whether and how each change is made. None leaves x unchanged.
        """
        if u is None:
            return x
        for change, (taken, *how) in zip(CHANGES, u.to(x.dtype).permute(1, 2, 0), strict=True):
            if change is LEFT_OUT.get(self.kind):
                continue
            if x.shape[1] == 4 and change in COLORS:  # the fourth channel is alpha
                x = torch.cat([change(x[:, :3], taken < self.p, *how), x[:, 3:]], 1)
            else:
                x = change(x, taken < self.p, *how)
        return x

    @torch.no_grad()
    def look(self, signs: Tensor, count: int) -> None:
        """Update ADA's p from the discriminator's output for a batch of reals.

        Args:
            signs: (), the mean sign of their logits, over all ranks.
            count: number of reals, over all ranks.
        """
        if self.kind != "ada":
            return
        self.signs += count * signs
        self.seen += count
        self.batches += 1
        if self.batches % EVERY == 0:
            step = torch.sign(self.signs / self.seen - self.target) * (self.seen / self.images_to_one)
            self.p = (self.p + step).clamp(0, 1)
            self.signs.zero_()
            self.seen = 0

    def state_dict(self) -> dict[str, Any]:
        return {"p": self.p, "signs": self.signs, "seen": self.seen, "batches": self.batches}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.p = state["p"].to(self.p.device, copy=True)
        self.signs = state["signs"].to(self.p.device, copy=True)
        self.seen, self.batches = state["seen"], state["batches"]


def mirror(x: Tensor, taken: Tensor, side: Tensor, _: Tensor) -> Tensor:
    return torch.where(column(taken & (side < 0.5)), x.flip(3), x)


def brightness(x: Tensor, taken: Tensor, how: Tensor, _: Tensor) -> Tensor:
    """Add a number in [-0.5, 0.5)."""
    return x + column(taken * (how - 0.5))


def saturation(x: Tensor, taken: Tensor, how: Tensor, _: Tensor) -> Tensor:
    """Multiply each pixel's distance from its gray value by a number in [0, 2)."""
    gray = x.mean(1, keepdim=True)
    return gray + column(torch.where(taken, 2 * how, 1)) * (x - gray)


def contrast(x: Tensor, taken: Tensor, how: Tensor, _: Tensor) -> Tensor:
    """Multiply the distance from the image's mean by a number in [0.5, 1.5)."""
    mean = x.mean((1, 2, 3), keepdim=True)
    return mean + column(torch.where(taken, how + 0.5, 1)) * (x - mean)


def translation(x: Tensor, taken: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """Move the image by up to an eighth of a side in each direction, and fill with zeros."""
    index = []
    for how, size in ((down, x.shape[2]), (right, x.shape[3])):
        most = int(SHIFT * size)
        moved = taken * ((2 * most + 1) * how - most).floor().long()  # (N,)
        # One pixel of zero padding stands for everything outside the image.
        index.append((torch.arange(size, device=x.device) - moved[:, None] + 1).clamp(0, size + 1))
    samples = torch.arange(len(x), device=x.device)[:, None, None]
    around = pad(x, (1, 1, 1, 1)).permute(0, 2, 3, 1)  # (N, H + 2, W + 2, C)
    return around[samples, index[0][:, :, None], index[1][:, None, :]].permute(0, 3, 1, 2)


def cutout(x: Tensor, taken: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """Set a square of half a side to zero, centered anywhere."""
    inside = []
    for how, size in ((down, x.shape[2]), (right, x.shape[3])):
        middle = (size * how).floor()[:, None]
        inside.append((torch.arange(size, device=x.device) - middle).abs() < CUT * size / 2)  # (N, size)
    hole = inside[0][:, None, :, None] & inside[1][:, None, None, :] & column(taken)
    return x * ~hole


def column(values: Tensor) -> Tensor:
    return values[:, None, None, None]


COLORS = (brightness, saturation, contrast)
CHANGES = (mirror, brightness, saturation, contrast, translation, cutout)
# Cutout lowers the discriminator's confidence on memorized images. ADA's p follows that confidence and stayed too low.
LEFT_OUT = {"diffaugment": mirror, "ada": cutout}
NUMBERS = (len(CHANGES), 3)  # uniform numbers per sample
