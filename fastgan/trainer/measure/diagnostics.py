"""Diagnostics of a training step, measured at log intervals without changing the run.

Diagnostics never draw from the run's random streams, and leave its weights, buffers and power iterations unchanged. A
run with diagnostics is bitwise equal to a run without.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _SpectralNorm

from fastgan.trainer.data.drawn import Source
from fastgan.trainer.data.held_out import sample_reals
from fastgan.trainer.gan import GAN

KERNEL_WIDTH = 0.25  # as a fraction of the reals' median distance; samples much closer than that count as one
JUDGED = 256  # number of reals of each kind whose logits are averaged; the mean of one small batch is mostly noise
TINY = 1e-12


class Diagnostics:
    """Call `before_step` before the measured step, and `observe` after it.

    `held_out` are reals that the discriminator never trains on, or None. `seed` chooses the batches to measure on.
    """

    def __init__(self, gan: GAN, held_out: Source | None, seed: int) -> None:
        self.gan, self.held_out, self.seed = gan, held_out, seed
        self.players: dict[str, nn.Module] = {"g": gan.generator, "d": gan.discriminator}
        self.before: dict[str, list[Tensor]] = {}

    def before_step(self) -> None:
        self.before = {
            key: [parameter.detach().clone() for parameter in model.parameters()] for key, model in self.players.items()
        }

    @torch.no_grad()
    def observe(self, step: int) -> dict[str, Any]:
        """Return the measurements of the last step, number `step`, on newly drawn samples.

        For each network (`g_`, `d_`):
            grad_norm: norm of the gradient that its last step used.
            update_ratio: norm(weights after - before) / norm(before), about 1e-3 in a healthy run.

        For the discriminator:
            d_real_accuracy, d_fake_accuracy: the fraction on the right side of the loss's boundary.
            d_real_sign, d_fake_sign: E[sign D(train)], the r_t of Karras et al. 2020, and E[sign D(fake)]. They are 1
                and -1 if it overfits or separates reals from fakes completely.
            d_train, d_held_out, d_fake: mean logits.
            overfit: (d_train - d_held_out) / (d_train - d_fake), their r_v. It is 0 if unseen reals score like training
                images, and 1 if they score like fakes. Absent if the source generates endless fresh samples.
            sigma: largest singular value of each spectrally normalized weight, estimated from its u and v.

        augment_p: ADA's probability of each change, if ADA is on.
        diversity: effective number of different samples in a batch of the generator, divided by that of equally many
            reals (`effective_number`). It is about 1 for good samples, and 1 / N if all samples are equal.
        nonfinite: number of infinite or NaN weights and gradients.
        """
        record: dict[str, Tensor] = {}
        for key, model in self.players.items():
            gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
            record[f"{key}_grad_norm"] = norm(gradients, self.gan.device)
            if key in self.before:
                moved = [p.detach() - b for p, b in zip(model.parameters(), self.before[key], strict=True)]
                weights = norm(self.before[key], self.gan.device).clamp_min(TINY)
                record[f"{key}_update_ratio"] = norm(moved, self.gan.device) / weights
        self.before = {}
        record |= self._logit_statistics(self.seed + 3 * step)
        record["nonfinite"] = self._nonfinite()
        if self.gan.optim.augment == "ada":
            record["augment_p"] = self.gan.augment.p
        names = list(record)
        values = dict(zip(names, torch.stack([record[name].double() for name in names]).tolist(), strict=True))
        values["nonfinite"] = int(values["nonfinite"])
        return values | {"sigma": sigmas(self.gan.discriminator)}

    def _logit_statistics(self, seed: int) -> dict[str, Tensor]:
        gan, batch_size = self.gan, self.gan.optim.batch_size
        z = torch.randn(batch_size, gan.latent_dim, generator=torch.Generator().manual_seed(seed), device="cpu")
        count = batch_size * max(1, JUDGED // batch_size)
        real, labels = sample_reals(gan.source, count, seed + 1)
        with preserved_buffers(gan.generator):
            fake = gan.fakes(z.to(gan.device), None if labels is None else labels[:batch_size])
        held_out: Tensor | None = None
        with evaluating(gan.discriminator):
            train, on_fake = self._logits(real, labels), self._logits(fake, labels)
            if self.held_out is not None:
                held_out = self._logits(*sample_reals(self.held_out, count, seed + 2))
        boundary = boundary_of(gan, train, on_fake)
        found = {
            "d_real_accuracy": (train > boundary).float().mean(),
            "d_fake_accuracy": (on_fake < boundary).float().mean(),
            "d_real_sign": (train - boundary).sign().mean(),
            "d_fake_sign": (on_fake - boundary).sign().mean(),
            "d_train": train.mean(),
            "d_fake": on_fake.mean(),
            "diversity": diversity(fake, real[:batch_size]),
        }
        if held_out is not None:
            found["d_held_out"] = held_out.mean()
            if gan.source.size is not None:
                apart = train.mean() - on_fake.mean()
                found["overfit"] = (train.mean() - held_out.mean()) / apart.abs().clamp_min(TINY)
        return found

    def _logits(self, samples: Tensor, labels: Tensor | None) -> Tensor:
        # Use batches of the training size, because minibatch layers depend on it.
        size = self.gan.optim.batch_size
        parts = [slice(start, start + size) for start in range(0, len(samples), size)]
        logits = [self.gan.logits(samples[part], None if labels is None else labels[part]) for part in parts]
        return torch.cat(logits).float()

    def _nonfinite(self) -> Tensor:
        total = torch.zeros((), device=self.gan.device)
        for model in self.players.values():
            for parameter in model.parameters():
                for tensor in (parameter, parameter.grad):
                    if tensor is not None:
                        total += (~tensor.isfinite()).sum()
        return total


def boundary_of(gan: GAN, real: Tensor, fake: Tensor) -> Tensor:
    """Return the logit that separates real from fake: the loss's boundary, or the midpoint of the mean logits."""
    boundary = gan.loss.boundary
    return (real.mean() + fake.mean()) / 2 if boundary is None else real.new_tensor(boundary)


def norm(tensors: Iterable[Tensor], device: torch.device) -> Tensor:
    """Return the Euclidean norm of all elements together."""
    members = list(tensors)
    if not members:
        return torch.zeros((), device=device)
    norms = torch.stack([value.float() for value in torch._foreach_norm(members)])
    total: Tensor = norms.norm()
    return total


def diversity(fake: Tensor, real: Tensor) -> Tensor:
    """Return `effective_number` of the fakes divided by that of the reals, with a width from the reals."""
    distances = torch.pdist(real.flatten(1).float())
    width = KERNEL_WIDTH * distances.median().clamp_min(TINY)
    return effective_number(fake, width) / effective_number(real, width)


def effective_number(samples: Tensor, width: Tensor) -> Tensor:
    """1 / mean_ij k(x_i, x_j)^2 with k(x, y) = exp(-|x - y|^2 / (2 width^2)).

    The Vendi score of order 2 (Friedman & Dieng 2023; Pasarkar & Dieng 2024). It is 1 if all samples are equal, and N
    if all distances are larger than the kernel width.
    """
    x = samples.flatten(1).float()
    # exp(-a)^2 = exp(-2 a). Expanding the squared distance would cancel digits for nearly equal samples.
    squared = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").square()  # (N, N)
    return 1 / torch.exp(-squared / width.square()).mean()


@torch.no_grad()
def sigmas(model: nn.Module) -> dict[str, float]:
    """Return u^T W v of each spectrally normalized weight of `model`, by module name."""
    found: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if not parametrize.is_parametrized(module):
            continue
        for key, tensors in module.parametrizations.items():
            spectral = tensors[0]
            if isinstance(spectral, _SpectralNorm) and tensors.original.ndim > 1:
                matrix = spectral._reshape_weight_to_matrix(tensors.original)  # (rows, cols)
                found[f"{name}.{key}"] = spectral._u @ (matrix @ spectral._v)
    values = torch.stack(list(found.values())).tolist() if found else []
    return dict(zip(found, values, strict=True))


@contextmanager
def preserved_buffers(model: nn.Module) -> Iterator[None]:
    """Run `model` in its current mode, and restore its buffers (batch norm's statistics) afterwards."""
    before = [buffer.clone() for buffer in model.buffers()]
    try:
        yield
    finally:
        for buffer, saved in zip(model.buffers(), before, strict=True):
            buffer.copy_(saved)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run `model` in evaluation mode: no power iteration, no dropout."""
    training = [module.training for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in zip(model.modules(), training, strict=True):
            module.training = mode
