"""A gradient penalty as a module: a kind, a weight, and how often it is taken."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastgan.ops.gradient_penalty import gradient_penalty
from fastgan.ops.gradient_penalty.kinds import check_kind, check_weight


class GradientPenalty(nn.Module):
    """``fastgan.gradient_penalty`` at every ``every``-th call, and zero at the others (lazy regularisation).

    The penalty is multiplied by ``every``, so that its mean over the calls is that of ``every=1``. The first call takes
    it; the count is in the state_dict.

        penalty = GradientPenalty("r1", weight=10, every=16)
        loss = softplus(-discriminator(real)).mean() + penalty(discriminator, real)

    Args:
        kind: see ``fastgan.gradient_penalty``.
        weight: factor; None: 10.
        every: calls from one penalty to the next, at least 1.

    Raises:
        ValueError: unknown kind, or ``every`` is no integer of at least 1.
        TypeError: ``weight`` is not a number.

    Differentiable once in the discriminator's parameters. Lazy form: Karras et al., StyleGAN2 (2020).
    """

    def __init__(self, kind: str = "wgan-gp", weight: float | None = None, every: int = 1) -> None:
        super().__init__()
        check_kind(kind)
        check_weight(weight)
        if not isinstance(every, int) or every < 1:
            raise ValueError(f"every must be an integer of at least 1, got {every!r}")
        self.kind, self.weight, self.every = kind, weight, every
        self.calls = 0

    def forward(
        self,
        discriminator: Callable[..., Any],
        real: Tensor,
        fake: Tensor | None = None,
        *,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        due = self.calls % self.every == 0
        self.calls += 1
        if not due:
            return real.new_zeros((), dtype=torch.float64 if real.dtype == torch.float64 else torch.float32)
        penalty = gradient_penalty(
            discriminator,
            real,
            fake,
            kind=self.kind,
            weight=self.weight,
            args=args,
            kwargs=kwargs,
            generator=generator,
        )
        return self.every * penalty

    def get_extra_state(self) -> dict[str, int]:
        return {"calls": self.calls}  # no buffer: reading one would wait for the device

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.calls = state["calls"]

    def extra_repr(self) -> str:
        return f"{self.kind!r}, weight={self.weight}, every={self.every}"
