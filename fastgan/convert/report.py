"""What a conversion did, module by module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from fastgan.convert import verify as comparison
from fastgan.convert.verify import Difference, Verification, table

__all__ = ["Difference", "Report", "Row", "Verification"]


@dataclass(frozen=True)
class Row:
    """One module: what it was replaced by, or None and why not."""

    path: str
    module: str
    replaced_by: str | None
    reason: str


@dataclass
class Report:
    """The modules of a converted model. Prints as a table; ``verify`` compares with the model as it was."""

    model: nn.Module = field(repr=False)
    rows: list[Row]

    @property
    def replaced(self) -> list[Row]:
        return [row for row in self.rows if row.replaced_by is not None]

    @property
    def left_alone(self) -> list[Row]:
        return [row for row in self.rows if row.replaced_by is None]

    def __str__(self) -> str:
        lines = [("module", "class", "replaced by", "")]
        lines += [(row.path or "(model)", row.module, row.replaced_by or "-", row.reason) for row in self.rows]
        return f"{table(lines)}\n{len(self.replaced)} replaced, {len(self.left_alone)} left alone"

    def verify(
        self, sample_inputs: Tensor | Sequence[Any] | Mapping[str, Any], kwargs: Mapping[str, Any] | None = None
    ) -> Verification:
        """Run the model and what it was, forward, backward and through a penalty on the first input's gradient.

        Works on copies: parameters, buffers and random numbers of the model and the process stay as they are. Both
        forms get the same inputs and random numbers. A result that the unconverted model doesn't have, a second
        derivative perhaps, is not compared; the verification says which and why. Two results count as equal if they
        differ by no more than an op is held to, or than the unconverted model's own sensitivity to rounding.

        Args:
            sample_inputs: the input of the model, or a list or tuple of its positional inputs. The first is a tensor
                or a container of tensors.
            kwargs: the model's inputs by name.

        Raises:
            TypeError: the first input has no tensor. Nothing that the model does is raised.
        """
        single = isinstance(sample_inputs, Tensor | Mapping)
        args = (sample_inputs,) if single else tuple(sample_inputs)
        if not any(True for _ in comparison.tensors_in(args[:1])):
            got = type(args[0]).__name__ if args else "none"
            raise TypeError(f"sample_inputs must be a tensor or begin with one, got {got}")
        return comparison.verify(self.model, args, dict(kwargs or {}))
