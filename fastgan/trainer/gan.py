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
from fastgan.trainer.optimisers import ExtraAdam, make_optimiser
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
        self.g_adam = make_optimiser(optim.optimiser, self.generator.parameters(), optim.g_lr, optim.betas)
        self.d_adam = make_optimiser(optim.optimiser, self.discriminator.parameters(), optim.d_lr, optim.betas)
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
        if isinstance(self.d_adam, ExtraAdam) and isinstance(self.g_adam, ExtraAdam):
            self._gradients()
            self.d_adam.extrapolate()
            self.g_adam.extrapolate()
            d_loss, g_loss = self._gradients()  # both players look ahead before either moves
            self.d_adam.step()
            self.g_adam.step()
        else:
            for _ in range(self.optim.d_steps):
                d_loss = self.discriminator_step(self.real(), self.latents())
            g_loss = self.generator_step(self.latents(), self._real_for_generator())
        self.ema.update(self.generator)
        return torch.stack([d_loss, g_loss])

    def discriminator_step(self, real: Tensor, z: Tensor) -> Tensor:
        loss = self.discriminator_gradient(real, z)
        self.d_adam.step()
        return loss

    def generator_step(self, z: Tensor, real: Tensor | None = None) -> Tensor:
        loss = self.generator_gradient(z, real)
        self.g_adam.step()
        return loss

    def discriminator_gradient(self, real: Tensor, z: Tensor) -> Tensor:
        """Leave the gradient of loss + penalty with the discriminator's parameters, and return that sum."""
        with torch.no_grad():
            fake = self.generator(z)
        judged = self.regulariser(self.discriminator, real, fake)
        loss = self.loss.discriminator(judged.real, judged.fake)
        if judged.penalty is not None:
            loss = loss + judged.penalty
        self.d_adam.zero_grad()
        loss.backward()
        return loss.detach()

    def generator_gradient(self, z: Tensor, real: Tensor | None = None) -> Tensor:
        """Leave the gradient of the loss with the generator's parameters, and return the loss."""
        self.discriminator.requires_grad_(False)  # its weights' gradients would be thrown away
        real_logits = None if real is None else self.discriminator(real)
        loss = self.loss.generator(real_logits, self.discriminator(self.generator(z)))
        self.g_adam.zero_grad()
        loss.backward()
        self.discriminator.requires_grad_(True)
        return loss.detach()

    def _gradients(self) -> tuple[Tensor, Tensor]:
        d_loss = self.discriminator_gradient(self.real(), self.latents())
        return d_loss, self.generator_gradient(self.latents(), self._real_for_generator())

    def _real_for_generator(self) -> Tensor | None:
        return self.real() if self.loss.relativistic else None

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
