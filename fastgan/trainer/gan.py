"""A generator, a discriminator, and the two steps of the game that they play."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fastgan.nn as fnn
from fastgan import backends
from fastgan.trainer.config import ModelConfig, OptimConfig
from fastgan.trainer.data import Source
from fastgan.trainer.ema import EMA
from fastgan.trainer.losses import LOSSES
from fastgan.trainer.models import build_models
from fastgan.trainer.optimisers import ExtraAdam, make_optimiser
from fastgan.trainer.regulariser import Regulariser


class Batch(NamedTuple):
    real: Tensor | None  # (N, *S)
    z: Tensor  # (N, latent_dim)
    labels: Tensor | None  # (N,)

    def to(self, dtype: torch.dtype) -> Batch:
        return Batch(None if self.real is None else self.real.to(dtype), self.z.to(dtype), self.labels)


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
        self.classes = classes_of(source, model)
        self.pack = model.pack
        generator, discriminator = build_models(source.shape, source.scale, model, self.classes)
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
            together=not mixes_its_batch(discriminator),
            generator=torch.Generator(device).manual_seed(seed + 1),
        )

    def latents(self) -> Tensor:
        z = torch.randn(self.optim.batch_size, self.latent_dim, generator=self.noise)
        return z.to(self.device)

    def real(self) -> Tensor:
        return self.source.next(self.optim.batch_size)

    def batch(self) -> Batch:
        """What a half-step needs: reals, latents, and where there are classes the labels that both share."""
        real, labels = self.source.next_labelled(self.optim.batch_size)
        return Batch(real, self.latents(), labels if self.classes else None)

    def generator_batch(self) -> Batch:
        """As `batch`; reals are drawn only where the generator's loss or its labels need them."""
        if self.loss.relativistic or self.classes:
            return self.batch()
        return Batch(None, self.latents(), None)

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
                d_loss = self.discriminator_step(self.batch())
            g_loss = self.generator_step(self.generator_batch())
        self.ema.update(self.generator)
        return torch.stack([d_loss, g_loss])

    def discriminator_step(self, batch: Batch) -> Tensor:
        loss = self.discriminator_gradient(batch)
        self.d_adam.step()
        return loss

    def generator_step(self, batch: Batch) -> Tensor:
        loss = self.generator_gradient(batch)
        self.g_adam.step()
        return loss

    def discriminator_gradient(self, batch: Batch) -> Tensor:
        """Leave the gradient of loss + penalty with the discriminator's parameters, and return that sum."""
        assert batch.real is not None
        with torch.no_grad():
            fake = self.fakes(batch.z, batch.labels)
        real, fake = packed(batch.real, self.pack), packed(fake, self.pack)
        with self._kernels():
            judged = self.regulariser(self.discriminator, real, fake, batch.labels)
        loss = self.loss.discriminator(judged.real, judged.fake)
        if judged.penalty is not None:
            loss = loss + judged.penalty
        self.d_adam.zero_grad()
        loss.backward()
        return loss.detach()

    def generator_gradient(self, batch: Batch) -> Tensor:
        """Leave the gradient of the loss with the generator's parameters, and return the loss."""
        self.discriminator.requires_grad_(False)  # its weights' gradients would be thrown away
        real_logits = None
        if self.loss.relativistic:
            assert batch.real is not None
            real_logits = self.logits(batch.real, batch.labels)
        fake = self.fakes(batch.z, batch.labels)
        loss = self.loss.generator(real_logits, self.logits(fake, batch.labels))
        self.g_adam.zero_grad()
        loss.backward()
        self.discriminator.requires_grad_(True)
        return loss.detach()

    def fakes(self, z: Tensor, labels: Tensor | None) -> Tensor:
        """Samples (N, *S) of the generator; a game without classes is blind to the labels."""
        samples: Tensor = self.generator(z) if self.classes is None else self.generator(z, labels)
        return samples

    def logits(self, x: Tensor, labels: Tensor | None) -> Tensor:
        """The discriminator's logits (N / pack, 1) of samples (N, *S)."""
        x = packed(x, self.pack)
        with self._kernels():
            logits: Tensor = self.discriminator(x) if self.classes is None else self.discriminator(x, labels)
        return logits

    def _kernels(self) -> AbstractContextManager[None]:
        return backends.use_backend("reference") if self.optim.kernels == "torch" else nullcontext()

    def _gradients(self) -> tuple[Tensor, Tensor]:
        return self.discriminator_gradient(self.batch()), self.generator_gradient(self.generator_batch())

    @torch.no_grad()
    def samples(self, z: Tensor) -> Tensor:
        """What the averaged generator makes of `z` (N, latent_dim), class after class where there are classes."""
        labels = (torch.arange(len(z), device=self.device) % self.classes,) if self.classes else ()
        samples: Tensor = self.ema.module(z.to(self.device), *labels)
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


def packed(x: Tensor, pack: int) -> Tensor:
    """(N, C, *S) -> (N / pack, pack * C, *S), samples that a discriminator judges together (Lin et al. 2018)."""
    return x if pack == 1 else x.reshape(len(x) // pack, -1, *x.shape[2:])


def mixes_its_batch(discriminator: nn.Module) -> bool:
    """Whether a sample's logit depends on its neighbours, so that reals and fakes may not share a call."""
    kinds = (nn.modules.batchnorm._BatchNorm, fnn.MinibatchStdDev, fnn.MinibatchDiscrimination)
    return any(isinstance(layer, kinds) for layer in discriminator.modules())


def classes_of(source: Source, model: ModelConfig) -> int | None:
    if not model.conditional:
        return None
    if source.classes is None:
        raise ValueError("conditional needs labelled data, and this data set has no labels")
    return source.classes
