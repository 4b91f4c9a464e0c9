"""An SNGAN critic with R1 on a ring of eight Gaussians as a LightningModule, with fastgan."""

import math

import lightning
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.data import DataLoader

import fastgan
from fastgan.nn.utils import fuse_spectral_norm

LATENT, WIDTH = 8, 64


def ring(count: int) -> Tensor:
    angle = 2 * math.pi * torch.randint(8, (count,)) / 8
    return torch.stack([angle.cos(), angle.sin()], 1) + 0.05 * torch.randn(count, 2)


def make_generator() -> nn.Module:
    return nn.Sequential(nn.Linear(LATENT, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 2))


def make_discriminator() -> nn.Module:
    return nn.Sequential(
        spectral_norm(nn.Linear(2, WIDTH)),
        nn.LeakyReLU(0.2),
        spectral_norm(nn.Linear(WIDTH, WIDTH)),
        nn.LeakyReLU(0.2),
        spectral_norm(nn.Linear(WIDTH, 1)),
    )


class GAN(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False  # two optimizers
        self.generator, self.discriminator = make_generator(), fuse_spectral_norm(make_discriminator())
        self.losses: list[float] = []

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.Adam(net.parameters(), 1e-3, (0.0, 0.9)) for net in (self.generator, self.discriminator)]

    def training_step(self, real: Tensor, index: int) -> None:
        g_optimizer, d_optimizer = self.optimizers()
        fake = self.generator(torch.randn(len(real), LATENT, device=self.device))
        loss = softplus(self.discriminator(fake.detach())).mean()
        logits, penalty = fastgan.logits_and_penalty(self.discriminator, real, kind="r1", weight=1.0)
        loss = loss + softplus(-logits).mean() + penalty
        d_optimizer.zero_grad()
        self.manual_backward(loss)
        d_optimizer.step()
        self.losses.append(loss.item())
        g_optimizer.zero_grad()
        self.manual_backward(softplus(-self.discriminator(fake)).mean())
        g_optimizer.step()


def train(steps: int, batch: int = 64, seed: int = 0) -> list[float]:
    """Train, and return the discriminator's losses."""
    torch.manual_seed(seed)
    gan = GAN()
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer = lightning.Trainer(max_epochs=1, **quiet)
    trainer.fit(gan, DataLoader(ring(steps * batch), batch))
    return gan.losses


if __name__ == "__main__":
    for i, loss in enumerate(train(steps=200)):
        print(i, f"{loss:.4f}")
