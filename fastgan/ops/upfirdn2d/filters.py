"""The taps of a filter. They are read from its tensor once and cached until the tensor changes or is freed."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple
from weakref import ref

import torch
from torch import Tensor

from fastgan.ops.library import accumulation_dtype
from fastgan.ops.upfirdn2d.plan import Taps


class _Read(NamedTuple):
    tensor: ref[Tensor]
    version: int
    rows: tuple[tuple[float, ...], ...]


_read: dict[int, _Read] = {}
_NO_FILTER = Taps((1.0, 1.0), 1, 1, True)


def taps_of(f: Tensor | None, flip: bool, gain: float, dtype: torch.dtype) -> Taps:
    """Return the taps in the order of the input, multiplied by the gain.

    Args:
        f: (h, w), or (k,) for both directions, or None.
        flip: keep the order of ``f``. A convolution reverses it.
        gain: factor of the result.
        dtype: the dtype of the sums. Its precision decides whether a plane is separable.
    """
    if f is None:
        return _NO_FILTER if gain == 1 else _NO_FILTER._replace(values=(gain, 1.0))
    return _ordered(_rows(f), flip, gain, torch.finfo(dtype).eps)


def _rows(f: Tensor) -> tuple[tuple[float, ...], ...]:
    if f.is_inference():  # has no version
        return _values(f)
    known = _read.get(id(f))
    if known is not None and known.tensor() is f and known.version == f._version:
        return known.rows
    rows = _values(f)
    key = id(f)
    _read[key] = _Read(ref(f, lambda _: _read.pop(key, None)), f._version, rows)
    return rows


def _values(f: Tensor) -> tuple[tuple[float, ...], ...]:
    return tuple(map(tuple, plane_of(f.detach()).to("cpu", torch.float64).tolist()))


def plane_of(f: Tensor) -> Tensor:
    """Return the filter as a plane (h, w), in its own dtype, or in float32 if that is half precision."""
    f = f.to(accumulation_dtype(f.dtype))
    return f if f.ndim == 2 else f[:, None] * f


@lru_cache(maxsize=256)
def _ordered(rows: tuple[tuple[float, ...], ...], flip: bool, gain: float, eps: float) -> Taps:
    factors = _factors(rows, eps)
    if factors is None:
        values = tuple(value * gain for row in rows for value in row)
        taps = Taps(values, len(rows), len(rows[0]), False)
    else:
        vertical, horizontal = factors
        values = (*(value * gain for value in vertical), *horizontal)
        taps = Taps(values, len(vertical), len(horizontal), True)
    return taps if flip else taps.flipped()


def _factors(rows: tuple[tuple[float, ...], ...], eps: float) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Return a column and a row whose outer product is the plane up to a relative error of ``eps``, or None."""
    largest, i, j = max((abs(value), i, j) for i, row in enumerate(rows) for j, value in enumerate(row))
    if not 0 < largest < float("inf"):
        return None
    horizontal = rows[i]
    vertical = tuple(row[j] / horizontal[j] for row in rows)
    products = ((v * h for h in horizontal) for v in vertical)
    off = (abs(p - value) for line, row in zip(products, rows, strict=True) for p, value in zip(line, row, strict=True))
    return (vertical, horizontal) if all(error <= eps * largest for error in off) else None
