"""Augmentation of what the discriminator sees, reals and fakes alike, for data that is scarce.

DiffAugment (Zhao et al. 2020) changes every image; ADA (Karras et al. 2020) makes each change with a probability p that
follows how sure the discriminator is of its training images, and cuts no holes, as its authors found best. A change is
affine in the image (products with numbers, sums, whole pixels moved), so it can be differentiated any number of times.
A penalty is taken on the gradient at the images as the discriminator sees them, changed.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

AugmentName = Literal["none", "diffaugment", "ada"]

EVERY = 4  # batches from one look at the signs to the next
SHIFT, CUT = 1 / 8, 1 / 2  # of a side: the longest translation, and the side of what is cut out


class Augment:
    """Changes images (N, C, H, W) by numbers that the caller draws, so that they are the same on every device.

    Args:
        kind: "none", "diffaugment", or "ada".
        images_to_one: images in which ADA's p may go from 0 to 1.
        target: of E[sign D(real)], above which ADA's p rises.
    """

    def __init__(
        self, kind: AugmentName, device: torch.device, images_to_one: int = 500_000, target: float = 0.6
    ) -> None:
        self.kind, self.images_to_one, self.target = kind, images_to_one, target
        # On the device, where nobody has to wait for it.
        self.p = torch.full((), 1.0 if kind == "diffaugment" else 0.0, device=device)
        self.signs = torch.zeros((), device=device)  # sum over the reals since the last look
        self.seen = self.batches = 0

    def __call__(self, x: Tensor, u: Tensor | None) -> Tensor:
        """
        Args:
            x: (N, C, H, W).
            u: (N, 6, 3), uniform in [0, 1): for each change whether it is made, and how. None: x stays as it is.
        """
        if u is None:
            return x
        for change, (taken, *how) in zip(CHANGES, u.to(x.dtype).permute(1, 2, 0), strict=True):
            if change is not LEFT_OUT.get(self.kind):
                x = change(x, taken < self.p, *how)
        return x

    @torch.no_grad()
    def look(self, signs: Tensor, count: int) -> None:
        """Let ADA's p follow the answers to a batch of reals.

        Args:
            signs: (), the mean sign of their logits, over all ranks.
            count: how many reals, on all ranks.
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
    """Multiply each pixel's distance from its grey by a number in [0, 2)."""
    grey = x.mean(1, keepdim=True)
    return grey + column(torch.where(taken, 2 * how, 1)) * (x - grey)


def contrast(x: Tensor, taken: Tensor, how: Tensor, _: Tensor) -> Tensor:
    """Multiply the distance from the image's mean by a number in [0.5, 1.5)."""
    mean = x.mean((1, 2, 3), keepdim=True)
    return mean + column(torch.where(taken, how + 0.5, 1)) * (x - mean)


def translation(x: Tensor, taken: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """Move the image by up to an eighth of a side each way, over zeros."""
    index = []
    for how, size in ((down, x.shape[2]), (right, x.shape[3])):
        most = int(SHIFT * size)
        moved = taken * ((2 * most + 1) * how - most).floor().long()  # (N,)
        # One pixel of zeros around the image stands for all outside it.
        index.append((torch.arange(size, device=x.device) - moved[:, None] + 1).clamp(0, size + 1))
    samples = torch.arange(len(x), device=x.device)[:, None, None]
    around = pad(x, (1, 1, 1, 1)).permute(0, 2, 3, 1)  # (N, H + 2, W + 2, C)
    return around[samples, index[0][:, :, None], index[1][:, None, :]].permute(0, 3, 1, 2)


def cutout(x: Tensor, taken: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """Put zeros into a square of half a side, whose middle is anywhere."""
    inside = []
    for how, size in ((down, x.shape[2]), (right, x.shape[3])):
        middle = (size * how).floor()[:, None]
        inside.append((torch.arange(size, device=x.device) - middle).abs() < CUT * size / 2)  # (N, size)
    hole = inside[0][:, None, :, None] & inside[1][:, None, None, :] & column(taken)
    return x * ~hole


def column(values: Tensor) -> Tensor:
    return values[:, None, None, None]


CHANGES = (mirror, brightness, saturation, contrast, translation, cutout)
# A hole makes the discriminator unsure of images that it knows by heart, and p follows that: with it, p stayed too low.
LEFT_OUT = {"diffaugment": mirror, "ada": cutout}
NUMBERS = (len(CHANGES), 3)  # uniform numbers a sample
