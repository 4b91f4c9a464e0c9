"""Calls into fastgan._native: the only place of this op where addresses are taken. None is the address 0."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgan import backends


def forward(m: Tensor, segments: Tensor | None, o: Tensor, first: int, exclude_self: bool) -> None:
    order, ends = _by_segment(segments)
    tensors, sizes = _addresses(order, ends, m, o), _sizes(m, ends, first, o)
    backends.native().minibatch_discrimination_forward(_name(m), tensors, sizes, exclude_self, torch.get_num_threads())


def backward(h: Tensor, m: Tensor, segments: Tensor | None, dm: Tensor, first: int) -> None:
    order, ends = _by_segment(segments)
    tensors, sizes = _addresses(order, ends, h, m, dm), _sizes(m, ends, first, dm)
    backends.native().minibatch_discrimination_backward(_name(m), tensors, sizes, torch.get_num_threads())


def double_backward(
    w: Tensor, h: Tensor, m: Tensor, segments: Tensor | None, by_h: Tensor | None, by_m: Tensor | None, first: int
) -> None:
    order, ends = _by_segment(segments)
    written = by_m if by_h is None else by_h
    if written is None:
        return
    tensors, sizes = _addresses(order, ends, w, h, m, by_h, by_m), _sizes(m, ends, first, written)
    backends.native().minibatch_discrimination_double_backward(_name(m), tensors, sizes, torch.get_num_threads())


def _by_segment(segments: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The samples of each segment one after another, and where in that order each segment ends."""
    if segments is None:
        return None, None
    ordered, order = segments.sort(stable=True)
    return order, ordered.unique_consecutive(return_counts=True)[1].cumsum(0)


def _sizes(m: Tensor, ends: Tensor | None, first: int, written: Tensor) -> tuple[int, ...]:
    return (*m.shape, first, len(written), 1 if ends is None else len(ends))


def _addresses(*tensors: Tensor | None) -> list[int]:
    return [0 if t is None else t.data_ptr() for t in tensors]


def _name(m: Tensor) -> str:
    return str(m.dtype).removeprefix("torch.")
