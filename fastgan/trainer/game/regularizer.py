"""The discriminator's logits and its gradient penalty, computed with the least work for each combination.

Costs of loss, penalty and their backward passes, in forward passes of the discriminator on one half of the batch (F),
for a piecewise-affine D:

    penalty            fastgan    PyTorch
    none                  6          6       both halves in one call
    r1, r2                7          9       penalty and loss of one half in one pass; a separate call for the other
    r1+r2                 8         12       both halves in one pass
    wgan-gp and similar  10         12       a separate pass at other points
    r1-finite-difference 13         13       approximate: a forward and its backward to the inputs, two more forwards
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastgan
from fastgan.ops.gradient_penalty.kinds import penalize
from fastgan.trainer.game.compiled import compiled
from fastgan.trainer.game.names import APPROXIMATE as APPROXIMATE
from fastgan.trainer.game.names import Kernels as Kernels
from fastgan.trainer.game.names import PenaltyName as PenaltyName

Discriminator = Callable[..., Tensor]


class LogitsAndPenalty(NamedTuple):
    real: Tensor  # logits (N, ...)
    fake: Tensor  # logits (N, ...)
    penalty: Tensor | None  # (), or None in batches without a penalty


class Regularizer:
    """Computes logits for real and fake batches, and the penalty in every ``every``-th batch, scaled by ``every``.

    Args:
        penalty: a kind of ``fastgan.gradient_penalty``, or "none".
        weight: factor of the penalty.
        every: batches from one penalty to the next, at least 1. The first batch has a penalty.
        kernels: "fastgan", or "torch" to compute the same values with PyTorch's double backward.
        together: whether D may take reals and fakes in one call. It must be false if D mixes its batch.
    """

    def __init__(self, penalty: PenaltyName, weight: float, every: int, kernels: Kernels, together: bool) -> None:
        self.penalty, self.weight, self.every = penalty, weight, every
        self.kernels, self.together = kernels, together
        self.batches = 0

    @property
    def between(self) -> bool:
        """Whether the penalty uses points between reals and fakes, or around reals (``alpha``)."""
        return self.penalty in ("wgan-gp", "wgan-lp", "zero-centered", "max-gp", "dragan")

    def __call__(
        self,
        discriminator: Discriminator,
        real: Tensor,
        fake: Tensor,
        labels: Tensor | None = None,
        alpha: Tensor | None = None,
        noise: Tensor | None = None,
        *,
        part: int = 0,
    ) -> LogitsAndPenalty:
        """
        Args:
            real, fake: (N, *S).
            labels: (N,), for a discriminator that takes them.
            alpha: (N,) in [0, 1), if ``between`` is true.
            noise: (N, *S) in [0, 1), for "dragan".
            part: index of this part if the batch is split. Only part 0 counts as a new batch.
        """
        self.batches += part == 0
        due = self.penalty != "none" and (self.batches - 1) % self.every == 0
        return self._logits_and_penalty(discriminator, real, fake, labels, alpha, noise, due)

    def compile(self) -> None:
        """Compile the calls that follow, in one form with a penalty and one without."""
        self._logits_and_penalty = compiled(self._logits_and_penalty)  # type: ignore[method-assign]

    def _logits_and_penalty(
        self,
        discriminator: Discriminator,
        real: Tensor,
        fake: Tensor,
        labels: Tensor | None,
        alpha: Tensor | None,
        noise: Tensor | None,
        due: bool,
    ) -> LogitsAndPenalty:
        args = () if labels is None else (labels,)
        if not due:
            return LogitsAndPenalty(*self._logits(discriminator, real, fake, *args), None)
        if self.between:
            x_hat = self._point(real, fake, alpha, noise)
            result = LogitsAndPenalty(
                *self._logits(discriminator, real, fake, *args), self._penalty_at(discriminator, x_hat, *args)
            )
        else:
            result = self._at_samples(discriminator, real, fake, *args)
        assert result.penalty is not None
        return result._replace(penalty=self.every * result.penalty)

    def _logits(self, discriminator: Discriminator, real: Tensor, fake: Tensor, *args: Tensor) -> tuple[Tensor, Tensor]:
        if not self.together:
            return discriminator(real, *args), discriminator(fake, *args)
        # One call for both halves saves a power iteration and makes larger matrix products.
        logits = discriminator(torch.cat([real, fake]), *(torch.cat([labels, labels]) for labels in args))
        real_logits, fake_logits = logits.chunk(2)
        return real_logits, fake_logits

    def _at_samples(self, discriminator: Discriminator, real: Tensor, fake: Tensor, *args: Tensor) -> LogitsAndPenalty:
        take = fastgan.logits_and_penalty if self.kernels == "fastgan" else double_backward
        weight = self.weight
        if self.penalty in APPROXIMATE:
            take = fastgan.logits_and_penalty  # first derivatives alone, which are PyTorch's
        if self.penalty in ("r1", *APPROXIMATE):
            real_logits, penalty = take(discriminator, real, kind=self.penalty, weight=weight, args=args)
            return LogitsAndPenalty(real_logits, discriminator(fake, *args), penalty)
        if self.penalty == "r2":
            fake_logits, penalty = take(discriminator, fake, kind="r2", weight=weight, args=args)
            return LogitsAndPenalty(discriminator(real, *args), fake_logits, penalty)
        if self.together:
            # The mean over both halves is half the sum of their means.
            twice = [torch.cat([labels, labels]) for labels in args]
            both, penalty = take(discriminator, torch.cat([real, fake]), kind="r1", weight=2 * weight, args=twice)
            real_logits, fake_logits = both.chunk(2)
            return LogitsAndPenalty(real_logits, fake_logits, penalty)
        real_logits, on_real = take(discriminator, real, kind="r1", weight=weight, args=args)
        fake_logits, on_fake = take(discriminator, fake, kind="r2", weight=weight, args=args)
        return LogitsAndPenalty(real_logits, fake_logits, on_real + on_fake)

    def _point(self, real: Tensor, fake: Tensor, alpha: Tensor | None, noise: Tensor | None) -> Tensor:
        assert alpha is not None
        alpha = alpha.view(-1, *[1] * (real.ndim - 1))
        if self.penalty == "dragan":
            assert noise is not None
            return real + alpha * 0.5 * real.std() * noise
        return torch.lerp(fake, real, alpha)

    def _penalty_at(self, discriminator: Discriminator, x_hat: Tensor, *args: Tensor) -> Tensor:
        if self.kernels == "torch":
            return double_backward(discriminator, x_hat, kind=self.penalty, weight=self.weight, args=args)[1]
        return _penalty_at(discriminator, x_hat, self.penalty, self.weight, args)

    def state_dict(self) -> dict[str, Any]:
        return {"batches": self.batches}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.batches = state["batches"]


@fastgan.compilable
def _penalty_at(
    discriminator: Discriminator, inputs: Tensor, kind: PenaltyName, weight: float, args: Sequence[Tensor]
) -> Tensor:
    x = inputs.detach().requires_grad_()
    return fastgan.penalty_from_logits(discriminator(x, *args), x, kind=kind, weight=weight)


def double_backward(
    discriminator: Discriminator, inputs: Tensor, *, kind: str, weight: float, args: Sequence[Tensor] = ()
) -> tuple[Tensor, Tensor]:
    """Return logits and penalty at ``inputs`` (N, *S), computed with plain PyTorch."""
    x = inputs.detach().requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):  # the only form of attention with a second derivative
        logits = discriminator(x, *args)
    (grad,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
    return logits, penalize(kind, grad, weight)
