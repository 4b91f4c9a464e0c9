"""Lockstep: a fused and a plain PyTorch copy of one GAN take the same steps from the same state.

Before each half-step the fused copy receives the plain copy's state, so that the comparison shows the error of one
half-step and not its growth in training. There are two comparisons:

- float32, with SiLU in place of ReLU and a smooth loss in place of the hinge. At a kink, a difference in the last bit
  selects another slope, and the gradient's error would say nothing about the kernels.
- float64, with networks and loss unchanged. Values within 1e-15 of a kink do not occur. Here a penalty uses one pass
  through a piecewise-affine discriminator, which the smooth copy never does.

Self-attention is multiplied by a factor that starts at zero. Both comparisons start from a factor of one, because zero
would hide the derivatives of attention.

If a third copy computes in float64, a float32 error may also reach OWN times PyTorch's own float32 error. Sums that
cancel (for example the distances of nearly equal samples in minibatch discrimination) lose digits in any
implementation.

Minibatch discrimination has a kink that cannot be smoothed, |m_i - m_j|. If two samples are so close that rounding
decides its sign, the gradient was seen to change by 9e-4. In float32, these games use the tolerances KINKED, and
float64 checks their digits.

Tolerances in float32 and float64:

- losses: 1e-5 and 1e-12, relative to max(1, |loss|), because a mean of logits of order 1 may cancel.
- gradients: 1e-4 and 1e-10 of each tensor's norm. A tensor whose gradient cancels (the last bias, real against fake;
  with a relativistic loss it is zero) carries the rounding error of the whole gradient. Therefore each norm counts as
  at least 1e-2 of the whole norm. In float32 that allows 1e-6 of it, eight units in the last place.
- u, v: 1e-5 and 1e-12; both are unit vectors.
- updates (the optimizer's change of the weights): 2e-2 and 2e-5 of the norm over all weights. In its first steps Adam
  divides a gradient by about its own size, so an element whose gradient is smaller than its error may move by lr in the
  wrong direction. With a relative gradient error e, that is a fraction of about e of the elements, or 2 sqrt(e) of the
  update's norm: 2e-2 for e = 1e-4, and 2e-5 for e = 1e-10.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastgan.nn import MinibatchDiscrimination
from fastgan.ops.gradient_penalty.small import at_any_size
from fastgan.trainer.game.losses import LOSSES
from fastgan.trainer.gan import GAN, Batch
from fastgan.trainer.models.sagan import SelfAttention

TOLERANCES = {
    torch.float32: {"loss": 1e-5, "gradient": 1e-4, "uv": 1e-5, "update": 2e-2},
    torch.float64: {"loss": 1e-12, "gradient": 1e-10, "uv": 1e-12, "update": 2e-5},
}
KINKED = {"gradient": 5e-3, "update": 0.15}
OWN = 4.0
LEAST_SHARE = 1e-2  # as a fraction of the whole gradient's norm


@dataclass
class Errors:
    """The largest error of each kind, and the tensor that has it."""

    dtype: torch.dtype = torch.float32
    worst: dict[str, tuple[float, str]] = dataclasses.field(default_factory=dict)
    own: dict[str, float] = dataclasses.field(default_factory=dict)  # PyTorch's own errors, if measured
    kinked: bool = False  # float32, with kinks that cannot be smoothed

    def add(self, kind: str, error: float, where: str) -> None:
        # NaN counts as larger than everything, so that a kernel that returns it fails.
        if kind not in self.worst or math.isnan(error) or error > self.worst[kind][0]:
            self.worst[kind] = (error, where)

    def tolerance(self, kind: str) -> float:
        least = KINKED.get(kind, 0.0) if self.kinked else 0.0
        return max(TOLERANCES[self.dtype][kind], OWN * self.own.get(kind, 0.0), least)

    def breaches(self) -> list[str]:
        return [
            f"{kind} of {where}: {error:.1e}, tolerance {self.tolerance(kind):.0e}"
            for kind, (error, where) in self.worst.items()
            if not error <= self.tolerance(kind)
        ]

    def include(self, other: Errors) -> None:
        self.kinked |= other.kinked
        for kind, (error, where) in other.worst.items():
            self.add(kind, error, where)
        for kind, error in other.own.items():
            self.own[kind] = max(error, self.own.get(kind, 0.0))


@dataclass(frozen=True)
class Step:
    """The results of one step of both networks."""

    number: int
    losses: tuple[float, float]  # of the discriminator and the generator, from the plain copy
    errors: Errors
    drift: float | None  # of the free-running copy

    def to_json(self) -> dict[str, Any]:
        worst = self.errors.worst
        return {
            "step": self.number,
            "dtype": str(self.errors.dtype).removeprefix("torch."),
            "d_loss": self.losses[0],
            "g_loss": self.losses[1],
            "errors": {kind: error for kind, (error, _) in worst.items()},
            "where": {kind: where for kind, (_, where) in worst.items()},
            "breaches": self.errors.breaches(),
            "drift": self.drift,
        }


def lockstep(
    reference: GAN, fused: GAN, steps: int, dtype: torch.dtype, free: GAN | None = None, exact: GAN | None = None
) -> Iterator[Step]:
    """Compare ``steps`` steps of two copies.

    Args:
        free: a fused copy that takes the same steps and is never reset. Training amplifies rounding, so its drift is
            reported but has no tolerance.
        exact: a plain copy that computes in float64 and shows the plain copy's own error.
    """
    for gan in filter(None, (reference, fused, free, exact)):
        for model in (gan.generator, gan.discriminator):
            model.to(torch.float64 if gan is exact else dtype)
        if dtype == torch.float32:
            smooth(gan)
    attend(reference)
    if free:
        copy_state(reference, free)
    layers = map(type, reference.discriminator.modules())
    kinked = dtype == torch.float32 and MinibatchDiscrimination in layers
    for number in range(1, steps + 1):
        errors = Errors(dtype, kinked=kinked)
        losses = []
        for name, batch in (("discriminator", reference.batch()), ("generator", reference.generator_batch())):
            batch = batch.to(dtype)
            before = weights(getattr(reference, name))
            for copied in filter(None, (fused, exact)):
                copy_state(reference, copied)
            losses.append(half_step(reference, name, batch))
            compare_half_step(before, reference, fused, name, losses[-1], half_step(fused, name, batch), errors)
            if exact:
                own = Errors(dtype)
                true = half_step(exact, name, batch.to(torch.float64))
                compare_half_step(before, exact, reference, name, true, losses[-1], own)
                errors.include(Errors(dtype, own={kind: error for kind, (error, _) in own.worst.items()}))
            if free:
                half_step(free, name, batch)
        drift = relative_drift(reference, free) if free else None
        yield Step(number, (losses[0], losses[1]), errors, drift)


def half_step(gan: GAN, name: str, batch: Batch) -> float:
    """Take one network's step and return its loss. The fused copy uses fastgan's penalty for networks of any size."""
    with at_any_size():
        loss: Tensor = getattr(gan, f"{name}_step")(batch)
    return loss.item()


def smooth(gan: GAN) -> GAN:
    """Replace everything that has kinks, in place."""
    if gan.loss is LOSSES["hinge"]:
        gan.loss = LOSSES["non-saturating"]
    for model in (gan.generator, gan.discriminator):
        for module in list(model.modules()):
            for name, child in module.named_children():
                if isinstance(child, nn.ReLU | nn.LeakyReLU):
                    setattr(module, name, nn.SiLU())
    return gan


@torch.no_grad()
def attend(gan: GAN) -> GAN:
    """Set the factors of self-attention to one, in place."""
    for model in (gan.generator, gan.discriminator):
        for module in model.modules():
            if isinstance(module, SelfAttention):
                module.factor.fill_(1.0)
    return gan


def copy_state(source: GAN, target: GAN) -> None:
    """Copy networks, optimizers and the count of lazy penalties. All kinds of spectral norm have the same keys."""
    for name in ("generator", "discriminator", "g_adam", "d_adam", "regularizer"):
        # An optimizer keeps the tensors that it loads. Without a copy both would share their moments.
        getattr(target, name).load_state_dict(copy.deepcopy(getattr(source, name).state_dict()))


def compare_half_step(
    before: dict[str, Tensor], true: GAN, other: GAN, name: str, wanted: float, got: float, errors: Errors
) -> None:
    """Add to ``errors`` how ``other`` differs from ``true`` after the half-step that both just took.

    ``before`` are that network's weights before the half-step, ``wanted`` and ``got`` are the losses.
    """
    errors.add("loss", abs(got - wanted) / max(1.0, abs(wanted)), name)
    pure, found = getattr(true, name), getattr(other, name)
    compare_gradients(pure, found, name, errors)
    compare_updates(before, weights(pure), weights(found), name, errors)
    vectors = other.discriminator.state_dict()
    for key, vector in true.discriminator.state_dict().items():
        if key.endswith(("._u", "._v")):
            errors.add("uv", float((vectors[key] - vector).norm()), key)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def compare_gradients(reference: nn.Module, fused: nn.Module, name: str, errors: Errors) -> None:
    wanted = {key: gradient(parameter) for key, parameter in reference.named_parameters()}
    least = LEAST_SHARE * math.sqrt(sum(float(g.norm()) ** 2 for g in wanted.values()))
    for key, parameter in fused.named_parameters():
        scale = max(float(wanted[key].norm()), least)
        errors.add("gradient", ratio(float((gradient(parameter) - wanted[key]).norm()), scale), f"{name}.{key}")


def gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def compare_updates(
    before: dict[str, Tensor], wanted: dict[str, Tensor], got: dict[str, Tensor], name: str, errors: Errors
) -> None:
    difference = math.sqrt(sum(float((got[key] - wanted[key]).norm()) ** 2 for key in wanted))
    update = math.sqrt(sum(float((wanted[key] - before[key]).norm()) ** 2 for key in wanted))
    errors.add("update", ratio(difference, update), name)


def relative_drift(reference: GAN, free: GAN) -> float:
    """Return the distance of the free copy's weights from the reference's, relative to the norm of the reference's."""
    difference = norm = 0.0
    for name in ("generator", "discriminator"):
        wanted, got = weights(getattr(reference, name)), weights(getattr(free, name))
        difference += sum(float((got[key] - wanted[key]).norm()) ** 2 for key in wanted)
        norm += sum(float(weight.norm()) ** 2 for weight in wanted.values())
    return math.sqrt(difference / norm)


def ratio(difference: float, scale: float) -> float:
    """difference / scale, or 0 if the difference is 0."""
    return 0.0 if difference == 0 else difference / scale if scale else math.inf
