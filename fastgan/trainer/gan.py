"""A generator, a discriminator, and the two steps of the game that they play."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgan.trainer.config import ModelConfig, OptimConfig
from fastgan.trainer.data import Source
from fastgan.trainer.ema import EMA
from fastgan.trainer.losses import LOSSES
from fastgan.trainer.models import build_models
from fastgan.trainer.regulariser import Regulariser


class GAN:
    """Everything that a training step reads or writes, and nothing else.

    `seed` fixes the weights (through PyTorch's global generator) and the latents (drawn on the CPU, so
    that every device sees the same ones).
    """

    def __init__(self, model: ModelConfig, optim: OptimConfig, source: Source, seed: int, device: torch.device) -> None:
        self.source = source
        self.optim = optim
        self.loss = LOSSES[optim.loss]
        self.latent_dim = model.latent_dim
        self.device = device
        torch.manual_seed(seed)
        generator, discriminator = build_models(source.shape, source.scale, model)
        self.generator, self.discriminator = generator.to(device), discriminator.to(device)
        self.ema = EMA(self.generator, optim.ema_decay)
        self.g_adam = torch.optim.Adam(self.generator.parameters(), optim.g_lr, optim.betas)
        self.d_adam = torch.optim.Adam(self.discriminator.parameters(), optim.d_lr, optim.betas)
        self.noise = torch.Generator().manual_seed(seed + 1)
        self.regulariser = Regulariser(
            optim.penalty,
            optim.penalty_weight,
            optim.penalty_every,
            optim.kernels,
            together=True,
            generator=torch.Generator(device).manual_seed(seed + 1),
        )

    def latents(self) -> Tensor:
        z = torch.randn(self.optim.batch_size, self.latent_dim, generator=self.noise)
        return z.to(self.device)

    def real(self) -> Tensor:
        return self.source.next(self.optim.batch_size)

    def step(self) -> Tensor:
        """One turn of the game; the losses (2,) of the discriminator's last step and of the generator's."""
        for _ in range(self.optim.d_steps):
            d_loss = self.discriminator_step(self.real(), self.latents())
        g_loss = self.generator_step(self.latents(), self.real() if self.loss.relativistic else None)
        self.ema.update(self.generator)
        return torch.stack([d_loss, g_loss])

    def discriminator_step(self, real: Tensor, z: Tensor) -> Tensor:
        with torch.no_grad():
            fake = self.generator(z)
        judged = self.regulariser(self.discriminator, real, fake)
        loss = self.loss.discriminator(judged.real, judged.fake)
        if judged.penalty is not None:
            loss = loss + judged.penalty
        self.d_adam.zero_grad()
        loss.backward()
        self.d_adam.step()
        return loss.detach()

    def generator_step(self, z: Tensor, real: Tensor | None = None) -> Tensor:
        self.discriminator.requires_grad_(False)  # its weights' gradients would be thrown away
        real_logits = None if real is None else self.discriminator(real)
        loss = self.loss.generator(real_logits, self.discriminator(self.generator(z)))
        self.g_adam.zero_grad()
        loss.backward()
        self.g_adam.step()
        self.discriminator.requires_grad_(True)
        return loss.detach()

    @torch.no_grad()
    def samples(self, z: Tensor) -> Tensor:
        """What the averaged generator makes of `z` (N, latent_dim)."""
        samples: Tensor = self.ema.module(z.to(self.device))
        return samples.cpu()

    def state_dict(self) -> dict[str, Any]:
        return {
            "generator": self.generator.state_dict(),
            "discriminator": self.discriminator.state_dict(),
            "ema": self.ema.state_dict(),
            "g_adam": self.g_adam.state_dict(),
            "d_adam": self.d_adam.state_dict(),
            "noise": self.noise.get_state(),
            "source": self.source.state_dict(),
            "regulariser": self.regulariser.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in ("generator", "discriminator", "ema", "g_adam", "d_adam", "source", "regulariser"):
            getattr(self, name).load_state_dict(state[name])
        self.noise.set_state(state["noise"])
