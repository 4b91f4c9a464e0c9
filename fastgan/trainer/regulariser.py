"""The discriminator's logits and its gradient penalty, by the least work that the combination needs.

Costs in forwards of the discriminator on one half (F), loss and penalty with their backward, for a piecewise-affine D:

    penalty            fastgan    PyTorch
    none                  6          6       both halves in one call
    r1, r2                7          9       penalty and loss of one half in one pass; the other half by itself
    r1+r2                 8         12       both halves in one pass
    wgan-gp and kin      10         12       at points of their own, beside the loss
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

import fastgan
from fastgan.ops.gradient_penalty.kinds import penalise, points

PenaltyName = Literal["none", "wgan-gp", "wgan-lp", "r1", "r2", "r1+r2", "dragan", "zero-centered", "max-gp"]
Kernels = Literal["fastgan", "torch"]
Discriminator = Callable[..., Tensor]


class Judged(NamedTuple):
    real: Tensor  # logits (N, ...)
    fake: Tensor  # logits (N, ...)
    penalty: Tensor | None  # (), None where none is due


class Regulariser:
    """Judges a real and a fake batch, and takes the penalty at every ``every``-th call (lazily, times ``every``).

    Args:
        penalty: a kind of ``fastgan.gradient_penalty``, or "none".
        weight: its factor.
        every: calls from one penalty to the next, at least 1; the first call takes it.
        kernels: "fastgan", or "torch" for the same numbers by PyTorch's own double backward.
        together: whether D may be given reals and fakes in one call, which is so unless it mixes its batch.
        generator: where random points come from.
    """

    def __init__(
        self,
        penalty: PenaltyName,
        weight: float,
        every: int,
        kernels: Kernels,
        together: bool,
        generator: torch.Generator,
    ) -> None:
        self.penalty, self.weight, self.every = penalty, weight, every
        self.kernels, self.together, self.generator = kernels, together, generator
        self.calls = 0

    def __call__(
        self, discriminator: Discriminator, real: Tensor, fake: Tensor, labels: Tensor | None = None
    ) -> Judged:
        due = self.penalty != "none" and self.calls % self.every == 0
        self.calls += 1
        args = () if labels is None else (labels,)
        if not due:
            return Judged(*self._logits(discriminator, real, fake, *args), None)
        judged = self._judge(discriminator, real, fake, *args)
        assert judged.penalty is not None
        return judged._replace(penalty=self.every * judged.penalty)

    def _logits(self, discriminator: Discriminator, real: Tensor, fake: Tensor, *args: Tensor) -> tuple[Tensor, Tensor]:
        if not self.together:
            return discriminator(real, *args), discriminator(fake, *args)
        # One call for both halves: one power iteration, and larger matrix products.
        logits = discriminator(torch.cat([real, fake]), *(torch.cat([labels, labels]) for labels in args))
        real_logits, fake_logits = logits.chunk(2)
        return real_logits, fake_logits

    def _judge(self, discriminator: Discriminator, real: Tensor, fake: Tensor, *args: Tensor) -> Judged:
        take = fastgan.logits_and_penalty if self.kernels == "fastgan" else double_backward
        weight = self.weight
        if self.penalty == "r1":
            real_logits, penalty = take(discriminator, real, kind="r1", weight=weight, args=args)
            return Judged(real_logits, discriminator(fake, *args), penalty)
        if self.penalty == "r2":
            fake_logits, penalty = take(discriminator, fake, kind="r2", weight=weight, args=args)
            return Judged(discriminator(real, *args), fake_logits, penalty)
        if self.penalty == "r1+r2" and self.together:
            # The mean over both halves is half the sum of their means.
            twice = [torch.cat([labels, labels]) for labels in args]
            both, penalty = take(discriminator, torch.cat([real, fake]), kind="r1", weight=2 * weight, args=twice)
            real_logits, fake_logits = both.chunk(2)
            return Judged(real_logits, fake_logits, penalty)
        if self.penalty == "r1+r2":
            real_logits, on_real = take(discriminator, real, kind="r1", weight=weight, args=args)
            fake_logits, on_fake = take(discriminator, fake, kind="r2", weight=weight, args=args)
            return Judged(real_logits, fake_logits, on_real + on_fake)
        logits = self._logits(discriminator, real, fake, *args)
        # In float32, so that a generator draws the same points for every precision of the networks.
        (x_hat,) = points(self.penalty, real.float(), fake.float(), self.generator)
        penalty_at = gradient_penalty_at if self.kernels == "fastgan" else double_backward
        _, penalty = penalty_at(discriminator, x_hat.to(real.dtype), kind=self.penalty, weight=weight, args=args)
        return Judged(*logits, penalty)

    def state_dict(self) -> dict[str, Any]:
        return {"calls": self.calls, "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.calls = state["calls"]
        self.generator.set_state(state["generator"])


def gradient_penalty_at(
    discriminator: Discriminator, inputs: Tensor, *, kind: str, weight: float, args: Sequence[Tensor] = ()
) -> tuple[Tensor, Tensor]:
    """``fastgan.gradient_penalty`` at points (N, *S) that are chosen already."""
    x = inputs.detach().requires_grad_()
    with fastgan.twice_differentiable():
        logits = discriminator(x, *args)
    return logits, fastgan.penalty_from_logits(logits, x, kind=kind, weight=weight)


def double_backward(
    discriminator: Discriminator, inputs: Tensor, *, kind: str, weight: float, args: Sequence[Tensor] = ()
) -> tuple[Tensor, Tensor]:
    """Logits and penalty at ``inputs`` (N, *S) as one writes them without fastgan."""
    x = inputs.detach().requires_grad_()
    logits = discriminator(x, *args)
    (grad,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
    return logits, penalise(kind, grad, weight)
