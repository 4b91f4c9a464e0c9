"""How a weight is viewed as a matrix, and the buffer of sigma, u and v that a forward saves for backward."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor


class Layout(NamedTuple):
    """The layout of a list of weights: each is (outer, rows, inner). A flat buffer holds sigma, u and v of each.

    Row r of the matrix is index r of the weight's dimension ``dim``. The column is outer_index * inner + inner_index.
    """

    dims: tuple[int, ...]
    matrices: tuple[tuple[int, int, int], ...]
    offsets: tuple[int, ...]
    total: int

    def of(self, chosen: Sequence[int]) -> Layout:
        """Return the layout of a subset of the weights, in the buffer of all weights."""
        dims, matrices, offsets, total = self
        return Layout(
            tuple(dims[i] for i in chosen),
            tuple(matrices[i] for i in chosen),
            tuple(offsets[i] for i in chosen),
            total,
        )


@lru_cache(maxsize=1024)
def _layout(shapes: tuple[torch.Size, ...], dims: tuple[int, ...]) -> Layout:
    matrices = tuple(
        (prod(shape[:dim]), shape[dim], prod(shape[dim + 1 :])) for shape, dim in zip(shapes, dims, strict=True)
    )
    offsets, total = [], 0
    for outer, rows, inner in matrices:
        offsets.append(total)
        total += 1 + rows + outer * inner
    return Layout(dims, matrices, tuple(offsets), total)


@lru_cache(maxsize=1024)
def _vector_shapes(shapes: tuple[torch.Size, ...], dims: tuple[int, ...]) -> tuple[tuple[int, ...], ...] | None:
    if not all(0 <= dim < len(shape) > 1 and prod(shape) for shape, dim in zip(shapes, dims, strict=True)):
        return None
    rows = [shape[dim] for shape, dim in zip(shapes, dims, strict=True)]
    return *((r,) for r in rows), *((prod(shape) // r,) for shape, r in zip(shapes, rows, strict=True))


# torch.compile ignores lru_cache and warns, so a compiled call uses the plain function.
def layout_of(weights: Sequence[Tensor], dims: Sequence[int]) -> Layout:
    layout = _layout.__wrapped__ if torch.compiler.is_compiling() else _layout
    return layout(tuple([w.shape for w in weights]), tuple(dims))


def vector_shapes(weights: Sequence[Tensor], dims: Sequence[int]) -> tuple[tuple[int, ...], ...] | None:
    """Return the shapes of all u, then of all v.

    Return None if a weight is not a matrix: it has one dimension, no element, or no dimension ``dim``.
    """
    shapes = _vector_shapes.__wrapped__ if torch.compiler.is_compiling() else _vector_shapes
    return shapes(tuple([w.shape for w in weights]), tuple(dims))


def as_matrix(weight: Tensor, dim: int) -> Tensor:
    """View the weight as (rows, columns): ``dim`` first, the other dimensions flattened in order."""
    return weight.movedim(dim, 0).flatten(1)


def split_saved(saved: Tensor, offset: int, matrix: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Return sigma (), u (rows,) and v (columns,) of the weight whose part of ``saved`` starts at ``offset``."""
    outer, rows, inner = matrix
    u_at = offset + 1
    v_at = u_at + rows
    return saved[offset], saved[u_at:v_at], saved[v_at : v_at + outer * inner]
