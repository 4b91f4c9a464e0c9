"""The interface of every source of real samples, and a base class for sources that generate fresh samples."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

ALL = slice(None)


class Source(Protocol):
    """An endless stream of real batches."""

    shape: tuple[int, ...]  # shape of one sample
    scale: float  # approximate largest absolute value in a sample
    classes: int | None  # number of classes, or None without labels
    class_names: list[str] | None  # None if the classes have only numbers
    notes: Sequence[str]  # lines about the data, for the user

    @property
    def size(self) -> int | None:
        """Number of samples, or None if every sample is generated fresh."""

    def fork(self, seed: int) -> Source:
        """Return another stream of the same samples, in its own order. The samples are not copied."""

    def next(self, batch_size: int) -> Tensor: ...

    def next_labeled(self, batch_size: int, rows: slice = ALL) -> tuple[Tensor, Tensor | None]:
        """Return the `rows` of the next batch and their labels. The stream advances by the whole batch."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Drawn(ABC):
    """A source that generates fresh samples on the CPU, so that every device sees the same ones."""

    shape: tuple[int, ...]
    scale: float
    classes: int | None = None
    class_names: list[str] | None = None
    notes: Sequence[str] = ()
    size = None

    def __init__(self, seed: int, device: torch.device) -> None:
        self.device = device
        self.generator = torch.Generator().manual_seed(seed)

    def next(self, batch_size: int) -> Tensor:
        return self.next_labeled(batch_size)[0]

    def next_labeled(self, batch_size: int, rows: slice = ALL) -> tuple[Tensor, Tensor | None]:
        samples, labels = self.draw(batch_size)
        return samples[rows].to(self.device), None if labels is None else labels[rows].to(self.device)

    @abstractmethod
    def draw(self, count: int) -> tuple[Tensor, Tensor | None]:
        """Return samples and their labels, on the CPU or on the device."""

    def fork(self, seed: int) -> Source:
        other = copy.copy(self)
        other.generator = torch.Generator().manual_seed(seed)
        return other

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.generator.set_state(state["generator"])
