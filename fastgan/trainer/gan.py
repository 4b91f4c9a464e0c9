"""A generator, a discriminator, and the training steps of both."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fastgan.nn as fnn
from fastgan import backends
from fastgan.trainer.config import ModelConfig, OptimConfig
from fastgan.trainer.data.drawn import Source
from fastgan.trainer.game.augment import NUMBERS, Augment
from fastgan.trainer.game.compiled import compiled, why_not
from fastgan.trainer.game.ema import EMA
from fastgan.trainer.game.fine_tuning import copy_weights, first_layers
from fastgan.trainer.game.losses import LOSSES
from fastgan.trainer.game.optimizers import ExtraAdam, make_optimizer
from fastgan.trainer.game.regularizer import Regularizer
from fastgan.trainer.game.schedule import rate_factor
from fastgan.trainer.models import build_models
from fastgan.trainer.ranks import Ranks

STATEFUL = (
    *("generator", "discriminator", "ema", "g_adam", "d_adam", "g_scaler", "d_scaler"),
    *("source", "regularizer", "augment"),
)


class Batch(NamedTuple):
    """The inputs of one half-step. Each tensor has N or N / pack rows."""

    real: Tensor | None  # (N, *S)
    z: Tensor  # (N, latent_dim)
    labels: Tensor | None  # (N,)
    alpha: Tensor | None = None  # (N / pack,) in [0, 1), for penalties at points between reals and fakes
    noise: Tensor | None = None  # (N, *S) in [0, 1), for DRAGAN
    u_real: Tensor | None = None  # (N, 6, 3) in [0, 1), for augmenting reals
    u_fake: Tensor | None = None  # (N, 6, 3) in [0, 1), for augmenting fakes

    def to(self, dtype: torch.dtype) -> Batch:
        cast = [t if t is None or not t.is_floating_point() else t.to(dtype) for t in self]
        return Batch(*cast)  # type: ignore[arg-type]

    def split(self, parts: int) -> list[Batch]:
        """Split into equal parts, in order."""
        chunks = [[None] * parts if t is None else t.chunk(parts) for t in self]
        return [Batch(*part) for part in zip(*chunks, strict=True)]


class GAN:
    """The complete state of a training step.

    `seed` sets the weights (through PyTorch's global generator) and the latents. Latents are drawn on the CPU, so that
    every device and every rank sees the same ones.
    """

    def __init__(
        self,
        model: ModelConfig,
        optim: OptimConfig,
        source: Source,
        seed: int,
        device: torch.device,
        ranks: Ranks | None = None,
    ) -> None:
        self.source = source
        self.optim = optim
        self.loss = LOSSES[optim.loss]
        self.latent_dim = model.latent_dim
        self.device = device
        self.ranks = ranks or Ranks(device)
        self.batch_size = rows_per_rank(model, optim, self.ranks)
        torch.manual_seed(seed)
        self.classes = classes_of(source, model)
        self.pack = model.pack
        generator, discriminator = build_models(source.shape, source.scale, model, self.classes)
        self.channels_last = model.channels_last and len(source.shape) == 3
        self.generator, self.discriminator = generator.to(device), discriminator.to(device)
        if self.channels_last:
            for network in (self.generator, self.discriminator):
                network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.frozen = first_layers(discriminator, optim.freeze_d) if optim.freeze_d else []
        self._train_discriminator()
        self.ema = EMA(self.generator, optim.average_decay, optim.ema_rampup)
        self.ranks.join(self.generator)
        self.ranks.join(self.discriminator)
        self.g_adam = make_optimizer(optim.optimizer, self.generator.parameters(), optim.g_lr, optim.betas)
        self.d_adam = make_optimizer(optim.optimizer, self.discriminator.parameters(), optim.d_lr, optim.betas)
        scaled = optim.precision == "float16"
        self.g_scaler = torch.amp.GradScaler(device.type, enabled=scaled)
        self.d_scaler = torch.amp.GradScaler(device.type, enabled=scaled)
        self.noise = torch.Generator().manual_seed(seed + 1)
        if optim.augment != "none" and len(source.shape) != 3:
            raise ValueError(f"augment {optim.augment} needs images (C, H, W), but samples have shape {source.shape}")
        self.augment = Augment(optim.augment, device, optim.ada_images, optim.ada_target)
        together = not mixes_its_batch(discriminator)
        self.regularizer = Regularizer(
            optim.penalty, optim.penalty_weight, optim.penalty_every, optim.kernels, together
        )
        compiles = optim.compile and self._can_compile()
        if compiles:
            self.regularizer.compile()
        self._compiled = [compiled(network) for network in (self.generator, self.discriminator)] if compiles else None

    def _can_compile(self) -> bool:
        reason = why_not(self.device)
        if reason and self.ranks.rank == 0:
            print(f"compile: the networks run uncompiled, because torch.compile failed ({reason})")
        return reason is None

    def latents(self) -> Tensor:
        """Return this rank's rows of the next latents."""
        z = torch.randn(self.optim.batch_size, self.latent_dim, generator=self.noise, device="cpu")
        return z[self.ranks.rows(len(z))].to(self.device)

    def real(self) -> Tensor:
        return self.batch().real  # type: ignore[return-value]

    def batch(self) -> Batch:
        """Return this rank's rows of the next batch. With classes, reals and fakes share the labels."""
        rows = self.ranks.rows(self.optim.batch_size)
        real, labels = self.source.next_labeled(self.optim.batch_size, rows)
        alpha = noise = None
        if self.regularizer.between:
            alpha = torch.rand(self.optim.batch_size // self.pack, generator=self.noise, device="cpu")
            alpha = alpha[self.ranks.rows(len(alpha))].to(self.device)
        if self.optim.penalty == "dragan":
            noise = self._uniform(*self.source.shape)
        z, labels = self.latents(), labels if self.classes else None
        return Batch(self._as_images(real), z, labels, alpha, noise, self._changes(), self._changes())

    def _uniform(self, *shape: int) -> Tensor:
        """Draw uniform numbers for the whole batch and return this rank's rows."""
        drawn = torch.rand(self.optim.batch_size, *shape, generator=self.noise, device="cpu")
        return drawn[self.ranks.rows(len(drawn))].to(self.device)

    def _changes(self) -> Tensor | None:
        return None if self.optim.augment == "none" else self._uniform(*NUMBERS)

    def generator_batch(self) -> Batch:
        """Like `batch`, but reals are drawn only if the generator's loss or the labels need them."""
        if self.loss.relativistic or self.classes:
            return self.batch()
        return Batch(None, self.latents(), None, u_fake=self._changes())

    def step(self) -> Tensor:
        """Train one step and return the losses (2,) of the last discriminator step and the generator step."""
        if self.optim.lr_warmup or self.optim.lr_decay:
            self._set_rates(rate_factor(self.ema.updates, self.optim.lr_warmup, self.optim.lr_decay))
        if isinstance(self.d_adam, ExtraAdam) and isinstance(self.g_adam, ExtraAdam):
            self._gradients()
            self.d_adam.extrapolate()
            self.g_adam.extrapolate()
            d_loss, g_loss = self._gradients()  # both networks extrapolate before either is updated
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
        self.d_scaler.step(self.d_adam)
        self.d_scaler.update()
        return loss

    def generator_step(self, batch: Batch) -> Tensor:
        loss = self.generator_gradient(batch)
        self.g_scaler.step(self.g_adam)
        self.g_scaler.update()
        return loss

    def discriminator_gradient(self, batch: Batch) -> Tensor:
        """Compute the gradient of loss + penalty for the discriminator's parameters, and return that sum."""
        parts = batch.split(self.optim.accumulate)
        total = torch.zeros((), device=self.device)
        self.d_adam.zero_grad()
        for number, part in enumerate(parts):
            assert part.real is not None
            with self._kernels():
                with torch.no_grad():
                    fake = self.augment(self.fakes(part.z, part.labels), part.u_fake)
                    real = self.augment(part.real, part.u_real)
                real, fake = packed(real, self.pack), packed(fake, self.pack)
                noise = None if part.noise is None else packed(part.noise, self.pack)
                result = self.regularizer(self.discriminator, real, fake, part.labels, part.alpha, noise, part=number)
            loss = self.loss.discriminator(at_least_float(result.real), at_least_float(result.fake))
            if result.penalty is not None:
                loss = loss + result.penalty
            if self.optim.augment == "ada":
                signs = (result.real.detach() - (self.loss.boundary or 0.0)).sign().mean()
                self.augment.look(self.ranks.mean(signs.float()), self.optim.batch_size // len(parts))
            loss = loss / len(parts)
            self.d_scaler.scale(loss).backward()
            total = total + loss.detach()
        self.ranks.average(self.discriminator)
        return self.ranks.mean(total)

    def generator_gradient(self, batch: Batch) -> Tensor:
        """Compute the gradient of the loss for the generator's parameters, and return the loss."""
        parts = batch.split(self.optim.accumulate)
        total = torch.zeros((), device=self.device)
        self.discriminator.requires_grad_(False)  # the gradients of its weights would be discarded
        self.g_adam.zero_grad()
        for part in parts:
            real_logits = None
            if self.loss.relativistic:
                assert part.real is not None
                real_logits = at_least_float(self.logits(self.augment(part.real, part.u_real), part.labels))
            fake = self.augment(self.fakes(part.z, part.labels), part.u_fake)
            fake_logits = at_least_float(self.logits(fake, part.labels))
            loss = self.loss.generator(real_logits, fake_logits) / len(parts)
            self.g_scaler.scale(loss).backward()
            total = total + loss.detach()
        self._train_discriminator()
        self.ranks.average(self.generator)
        return self.ranks.mean(total)

    def fakes(self, z: Tensor, labels: Tensor | None) -> Tensor:
        """Return the generator's samples (N, *S). An unconditional generator ignores the labels."""
        with self._kernels():
            generator = self._compiled[0] if self._compiled else self.generator
            samples: Tensor = generator(z) if self.classes is None else generator(z, labels)
        return self._as_images(at_least_float(samples))

    def logits(self, x: Tensor, labels: Tensor | None) -> Tensor:
        """Return the discriminator's logits (N / pack, 1) of samples (N, *S)."""
        x = packed(x, self.pack)
        with self._kernels():
            discriminator = self._compiled[1] if self._compiled else self.discriminator
            logits: Tensor = discriminator(x) if self.classes is None else discriminator(x, labels)
        return logits

    @contextmanager
    def _kernels(self) -> Iterator[None]:
        """Make networks use the configured precision and kernels."""
        precision = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}[self.optim.precision]
        with ExitStack() as stack:
            if self.optim.kernels == "torch":
                stack.enter_context(backends.use_backend("reference"))
            if precision is not None:
                stack.enter_context(torch.autocast(self.device.type, precision))
            yield

    def _train_discriminator(self) -> None:
        self.discriminator.requires_grad_(True)
        for parameter in self.frozen:
            parameter.requires_grad_(False)

    def start_from(self, generator: dict[str, Tensor], discriminator: dict[str, Tensor] | None) -> list[str]:
        """Copy the weights of other networks that fit, and return one line for each tensor that does not."""
        problems = [f"generator.{line}" for line in copy_weights(self.generator, generator)]
        if discriminator is not None:
            problems += [f"discriminator.{line}" for line in copy_weights(self.discriminator, discriminator)]
        self.ema.restart(self.generator)
        return problems

    def _as_images(self, x: Tensor) -> Tensor:
        return x.contiguous(memory_format=torch.channels_last) if self.channels_last else x

    def _gradients(self) -> tuple[Tensor, Tensor]:
        return self.discriminator_gradient(self.batch()), self.generator_gradient(self.generator_batch())

    @torch.no_grad()
    def samples(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the averaged generator's samples of `z` (N, latent_dim), on the CPU.

        With classes, `labels` (N,) are used, or all classes in turn.
        """
        given: tuple[Tensor, ...] = ()
        if self.classes:
            every = torch.arange(len(z), device=self.device) % self.classes
            given = (every if labels is None else labels.to(self.device),)
        samples: Tensor = self.ema.module(z.to(self.device), *given)
        return samples.cpu()

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name).state_dict() for name in STATEFUL} | {"noise": self.noise.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if "regulariser" in state:  # a checkpoint of an older run
            state = state | {"regularizer": state["regulariser"]}
        for name in STATEFUL:
            getattr(self, name).load_state_dict(state[name])
        self._set_rates(1.0)  # the run may have been resumed with others
        self.noise.set_state(state["noise"])

    def _set_rates(self, factor: float) -> None:
        for adam, lr in ((self.g_adam, self.optim.g_lr), (self.d_adam, self.optim.d_lr)):
            for group in adam.param_groups:
                group["lr"], group["betas"] = factor * lr, self.optim.betas


def packed(x: Tensor, pack: int) -> Tensor:
    """Reshape (N, C, *S) to (N / pack, pack * C, *S): samples that are judged together (Lin et al. 2018)."""
    return x if pack == 1 else x.reshape(len(x) // pack, -1, *x.shape[2:])


def mixes_its_batch(discriminator: nn.Module) -> bool:
    """Whether a sample's logit depends on other samples of its batch, so that reals and fakes need separate calls."""
    kinds = (nn.modules.batchnorm._BatchNorm, fnn.MinibatchStdDev, fnn.MinibatchDiscrimination)
    return any(isinstance(layer, kinds) for layer in discriminator.modules())


def classes_of(source: Source, model: ModelConfig) -> int | None:
    if not model.conditional:
        return None
    if source.classes is None:
        raise ValueError("conditional needs labeled data, but this data set has no labels")
    return source.classes


def at_least_float(x: Tensor) -> Tensor:
    """Convert half precision to float32, for losses and pixels."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def rows_per_rank(model: ModelConfig, optim: OptimConfig, ranks: Ranks) -> int:
    parts = ranks.size * optim.accumulate * model.pack
    if optim.batch_size % parts:
        raise ValueError(f"batch_size {optim.batch_size} must be a multiple of ranks * accumulate * pack, {parts}")
    return optim.batch_size // ranks.size
