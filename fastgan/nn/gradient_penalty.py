"""The gradient penalty as a module, with lazy regularization."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastgan.ops.gradient_penalty import gradient_penalty
from fastgan.ops.gradient_penalty.inputs import Inputs, check_inputs, floating
from fastgan.ops.gradient_penalty.kinds import Dims, Kind, Number, Penalty
from fastgan.ops.gradient_penalty.outputs import Select, check_select
from fastgan.ops.library import untraced


class GradientPenalty(nn.Module):
    """Compute ``fastgan.gradient_penalty`` at every ``every``-th call and zero at all others (lazy regularization).

    The first call computes the penalty. The result is multiplied by ``every``, so that the mean over calls equals that
    of ``every=1``. The number of calls is part of the state_dict. The zero of the other calls can be added to a loss,
    and ``backward`` can be called on it alone; it gives no parameter a gradient.

    Order of derivative: one, in the discriminator's parameters.

    Source of lazy regularization: Karras et al., StyleGAN2 (2020).

    ```python
    import torch
    import fastgan

    discriminator = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.LeakyReLU(0.2), torch.nn.Flatten())
    discriminator.append(torch.nn.LazyLinear(1))
    real = torch.randn(4, 3, 16, 16)
    penalty = fastgan.nn.GradientPenalty("r1", weight=10, every=16)
    loss = torch.nn.functional.softplus(-discriminator(real)).mean() + penalty(discriminator, real)
    loss.backward()
    ```

    Args:
        kind: see ``fastgan.gradient_penalty``.
        weight: see ``fastgan.gradient_penalty``. An ``nn.Parameter`` becomes a parameter of this module.
        every: number of calls from one penalty to the next, at least 1.
        select: see ``fastgan.gradient_penalty``.
        target: see ``fastgan.gradient_penalty``. An ``nn.Parameter`` becomes a parameter of this module.
        dims: see ``fastgan.gradient_penalty``.
        reduction: see ``fastgan.gradient_penalty``.

    Raises:
        ValueError: the kind or reduction is unknown, the kind has no target but one is given, ``dims`` contains the
            dimension of the samples, or ``every`` is not an integer of at least 1.
        TypeError: an argument has the wrong type.
    """

    def __init__(
        self,
        kind: Kind = "wgan-gp",
        weight: Number | None = None,
        every: int = 1,
        *,
        select: Select | None = None,
        target: Number | None = None,
        dims: Dims | None = None,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        Penalty(kind, weight, target, dims, reduction)
        check_select(select)
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise ValueError(f"every must be an integer of at least 1, got {every!r}")
        self.kind, self.weight, self.every = kind, weight, every
        self.select, self.target, self.dims, self.reduction = select, target, dims, reduction
        self.calls = 0

    @untraced
    def forward(
        self,
        discriminator: Callable[..., Any],
        real: Inputs,
        fake: Inputs | None = None,
        *,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        due = self.calls % self.every == 0
        self.calls += 1
        if not due:
            check_inputs("real", real)
            penalty = Penalty(self.kind, self.weight, self.target, self.dims, self.reduction)
            return penalty.zero(floating(real))
        return self.every * gradient_penalty(
            discriminator,
            real,
            fake,
            kind=self.kind,
            weight=self.weight,
            select=self.select,
            target=self.target,
            dims=self.dims,
            reduction=self.reduction,
            args=args,
            kwargs=kwargs,
            generator=generator,
        )

    def get_extra_state(self) -> dict[str, int]:
        return {"calls": self.calls}  # not a buffer, because reading one would synchronize with the device

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.calls = state["calls"]

    def extra_repr(self) -> str:
        optional = {"select": self.select, "target": self.target, "dims": self.dims}
        chosen = [f", {name}={value!r}" for name, value in optional.items() if value is not None]
        chosen += [f", reduction={self.reduction!r}"] if self.reduction != "mean" else []
        return f"{self.kind!r}, weight={self.weight}, every={self.every}{''.join(chosen)}"
