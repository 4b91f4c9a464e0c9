"""A gradient penalty as a module: a kind, a weight, and how often it is taken."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from fastgan.ops.gradient_penalty import gradient_penalty
from fastgan.ops.gradient_penalty.inputs import Inputs, check_inputs, floating
from fastgan.ops.gradient_penalty.kinds import Dims, Kind, Number, Penalty
from fastgan.ops.gradient_penalty.outputs import Select, check_select
from fastgan.ops.regions import compilable


class _Turn:
    """A place in a ring of ``every`` calls.

    torch.compile makes a graph for every value of a number that changes. Of this it sees what it reads: whether a
    penalty is due, and which turn is next. That makes two graphs, one with a penalty and one without.
    """

    next: _Turn

    def __init__(self, every: int, index: int) -> None:
        self.every, self.index = every, index
        self.is_due = index == 0

    def __deepcopy__(self, memo: Any) -> _Turn:
        return self

    def __reduce__(self) -> Any:
        return _turn, (self.every, self.index)


@cache
def _ring(every: int) -> list[_Turn]:
    turns = [_Turn(every, index) for index in range(every)]
    for i, turn in enumerate(turns):
        turn.next = turns[(i + 1) % every]
    return turns


def _turn(every: int, calls: int) -> _Turn:
    return _ring(every)[calls % every]


class GradientPenalty(nn.Module):
    """``fastgan.gradient_penalty`` at every ``every``-th call, and zero at the others (lazy regularization).

    The penalty is multiplied by ``every``, so that its mean over the calls is that of ``every=1``. The first call takes
    it. The count of calls since then is in the state_dict. The zero between can be added to a loss, or called
    ``backward`` on alone outside of torch.compile; no parameter gets a gradient from it.

        penalty = GradientPenalty("r1", weight=10, every=16)
        loss = softplus(-discriminator(real)).mean() + penalty(discriminator, real)

    Args:
        kind, weight, select, target, dims, reduction: see ``fastgan.gradient_penalty``. An ``nn.Parameter`` as weight
            or target is a parameter of this module.
        every: calls from one penalty to the next, at least 1.

    Raises:
        ValueError: unknown kind or reduction, a target for a kind without one, dims with the samples in it, or
            ``every`` is no integer of at least 1.
        TypeError: an argument has a wrong type.

    Differentiable once in the discriminator's parameters. Lazy form: Karras et al., StyleGAN2 (2020).
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
        self._turn = _turn(every, 0)

    @property
    def calls(self) -> int:
        """The calls since the last penalty was due, this one included; 0: the next call takes a penalty."""
        return self._turn.index

    @compilable
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
        due = self._turn.is_due
        self._turn = self._turn.next
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
        return {"calls": self.calls}  # no buffer: reading one would wait for the device

    def set_extra_state(self, state: dict[str, int]) -> None:
        self._turn = _turn(self.every, state["calls"])

    def extra_repr(self) -> str:
        optional = {"select": self.select, "target": self.target, "dims": self.dims}
        chosen = [f", {name}={value!r}" for name, value in optional.items() if value is not None]
        chosen += [f", reduction={self.reduction!r}"] if self.reduction != "mean" else []
        return f"{self.kind!r}, weight={self.weight}, every={self.every}{''.join(chosen)}"
