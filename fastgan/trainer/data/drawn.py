"""What every source of real samples can do, and sources that draw fresh samples."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import Any, Protocol

import torch
from torch import Tensor

ALL = slice(None)


class Source(Protocol):
    """An endless stream of real batches."""

    shape: tuple[int, ...]  # of one sample
    scale: float  # about the largest value in a sample
    classes: int | None  # how many labels there are, where there are any

    @property
    def size(self) -> int | None:
        """How many samples there are; None where each one is drawn afresh."""

    def fork(self, seed: int) -> Source:
        """Another stream of the same samples (not a copy of them), in an order of its own."""

    def next(self, batch_size: int) -> Tensor: ...

    def next_labelled(self, batch_size: int, rows: slice = ALL) -> tuple[Tensor, Tensor | None]:
        """The `rows` of the next batch and their labels; the stream moves on by the whole batch."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Drawn(ABC):
    """A source that draws fresh samples, on the CPU so that every device sees the same ones."""

    shape: tuple[int, ...]
    scale: float
    classes: int | None = None
    size = None

    def __init__(self, seed: int, device: torch.device) -> None:
        self.device = device
        self.generator = torch.Generator().manual_seed(seed)

    def next(self, batch_size: int) -> Tensor:
        return self.next_labelled(batch_size)[0]

    def next_labelled(self, batch_size: int, rows: slice = ALL) -> tuple[Tensor, Tensor | None]:
        samples, labels = self.draw(batch_size)
        return samples[rows].to(self.device), None if labels is None else labels[rows].to(self.device)

    @abstractmethod
    def draw(self, count: int) -> tuple[Tensor, Tensor | None]:
        """Samples and their labels, on the CPU or on the device."""

    def fork(self, seed: int) -> Source:
        other = copy.copy(self)
        other.generator = torch.Generator().manual_seed(seed)
        return other

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.generator.set_state(state["generator"])
