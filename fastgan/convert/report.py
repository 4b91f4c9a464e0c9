"""The report of a conversion, module by module."""

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
    """The outcome for one module: its replacement or None, and the reason."""

    path: str
    module: str
    replaced_by: str | None
    reason: str


@dataclass
class Report:
    """The modules of a converted model. It prints as a table, and ``verify`` compares the model with its original."""

    model: nn.Module = field(repr=False)
    rows: list[Row]

    @property
    def replaced(self) -> list[Row]:
        return [row for row in self.rows if row.replaced_by is not None]

    @property
    def unchanged(self) -> list[Row]:
        return [row for row in self.rows if row.replaced_by is None]

    def __str__(self) -> str:
        lines = [("module", "class", "replaced by", "note")]
        lines += [(row.path or "(model)", row.module, row.replaced_by or "-", row.reason) for row in self.rows]
        return f"{table(lines)}\n{len(self.replaced)} replaced, {len(self.unchanged)} unchanged"

    def verify(
        self, sample_inputs: Tensor | Sequence[Any] | Mapping[str, Any], kwargs: Mapping[str, Any] | None = None
    ) -> Verification:
        """Compare the converted model with its original in forward, backward and a penalty on the first input.

        Both forms run as copies, with the same inputs and random numbers. The model's parameters and buffers and the
        random number generators of the process do not change. If the unconverted model has no result of some kind, for
        example no second derivative, that kind is not compared, and the verification states the reason. Two results are
        equal if they differ by no more than the tolerance for single ops, or by no more than the unconverted model's
        own sensitivity to rounding.

        Args:
            sample_inputs: the input of the model, or a list or tuple of its positional inputs. The first one must be a
                tensor or a container of tensors.
            kwargs: keyword inputs of the model.

        Returns:
            A verification. Print it, or read its ``equal``.

        Raises:
            TypeError: the first input contains no tensor. Errors inside the model do not propagate.
        """
        single = isinstance(sample_inputs, Tensor | Mapping)
        args = (sample_inputs,) if single else tuple(sample_inputs)
        if not any(True for _ in comparison.tensors_in(args[:1])):
            got = type(args[0]).__name__ if args else "none"
            raise TypeError(f"sample_inputs must be a tensor or begin with one, got {got}")
        return comparison.verify(self.model, args, dict(kwargs or {}))
