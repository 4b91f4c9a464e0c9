"""The gradient penalty as a module, with lazy regularization."""

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
from fastgan.ops.regions import traceable


class _Turn:
    """One of ``every`` calls, linked in a ring.

    torch.compile would compile one graph for each value of a counter. It guards only the attributes of a turn that it
    reads, so it compiles two graphs: one with a penalty and one without.
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
    """Compute ``fastgan.gradient_penalty`` at every ``every``-th call and zero at all others (lazy regularization).

    The first call computes the penalty. The result is multiplied by ``every``, so that the mean over calls equals that
    of ``every=1``. The number of calls since the last penalty is part of the state_dict. The zero of the other calls
    can be added to a loss. Outside torch.compile, ``backward`` can also be called on it alone; parameters get no
    gradient.

    Call the module as ``penalty(discriminator, real, fake=None, args=(), kwargs=None, generator=None)``. The arguments
    and the result have the shapes and dtypes of ``fastgan.gradient_penalty``.

    Order of derivative: one, with respect to the parameters of the discriminator.

    Source of lazy regularization: Karras et al., StyleGAN2 (2020).

    ```python
    import torch
    import fastgan

    discriminator = torch.nn.Sequential(
        torch.nn.Flatten(),
        torch.nn.Linear(768, 64),
        torch.nn.ReLU(),
        torch.nn.Linear(64, 1),
    )
    real = torch.randn(4, 3, 16, 16)
    penalty = fastgan.nn.GradientPenalty("r1", weight=10, every=16)
    loss = torch.nn.functional.softplus(-discriminator(real)).mean()
    loss = loss + penalty(discriminator, real)
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
        self._turn = _turn(every, 0)

    @property
    def calls(self) -> int:
        """The calls since the last penalty was due, this one included; 0: the next call takes a penalty."""
        return self._turn.index

    @traceable
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
        if self.every > 1 and _is_captured():
            raise RuntimeError(
                f"GradientPenalty(every={self.every}) counts calls on the host, and a graph would repeat this one: "
                "graph a step with the penalty and one without it, and choose between them"
            )
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
        return {"calls": self.calls}  # not a buffer, because reading one would synchronize with the device

    def set_extra_state(self, state: dict[str, int]) -> None:
        self._turn = _turn(self.every, state["calls"])

    def extra_repr(self) -> str:
        optional = {"select": self.select, "target": self.target, "dims": self.dims}
        chosen = [f", {name}={value!r}" for name, value in optional.items() if value is not None]
        chosen += [f", reduction={self.reduction!r}"] if self.reduction != "mean" else []
        return f"{self.kind!r}, weight={self.weight}, every={self.every}{''.join(chosen)}"


def _is_captured() -> bool:
    """Whether a CUDA graph is being captured. Captures by torch.compile do not count: its graphs guard the calls."""
    if torch.compiler.is_compiling() or not torch.cuda.is_initialized():
        return False
    return torch.cuda.is_current_stream_capturing()
