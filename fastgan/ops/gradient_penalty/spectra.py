"""Rules for Fourier transforms and complex numbers: real and imaginary parts are linear in what they are made from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastgan.ops.gradient_penalty.call import Call
from fastgan.ops.gradient_penalty.layout import Ineligible, Layout
from fastgan.ops.gradient_penalty.shapes import apart_from
from fastgan.ops.gradient_penalty.table import functions
from fastgan.ops.piecewise.padding import ROUTES

_STFT = (
    *("n_fft", "hop_length", "win_length", "window", "center", "pad_mode"),
    *("normalized", "onesided", "return_complex", "align_to_window"),
)


def pad_first(call: Call, input: Tensor, *args: Any, **named: Any) -> None:
    """Pad the signal by fastgan's function. That of PyTorch's stft propagates zeros."""
    call.require_input(input)
    call.source = input
    given = dict(zip(_STFT, args, strict=False)) | named
    if given.get("center", True) and input.ndim == 2:
        half = given["n_fft"] // 2
        padded = ROUTES[F.pad](input, [half, half], given.pop("pad_mode", "reflect"))
        call.args, call.kwargs = (padded,), given | {"center": False}


def _stft(call: Call, *args: Any, **named: Any) -> Layout:
    call.require_constants(args[1:], named.get("window"))
    return call.layout_before(call.source, 1)


def _istft(call: Call, input: Tensor, *args: Any, **named: Any) -> Layout:
    call.require_constants(args, named)
    return call.layout_before(input, 2)


def _transform(call: Call, input: Tensor, n: Any = None, dim: int = -1, norm: str | None = None) -> Layout:
    return apart_from(call, input, dim)


def _transform_2d(call: Call, input: Tensor, s: Any = None, dim: Any = (-2, -1), norm: str | None = None) -> Layout:
    return apart_from(call, input, dim)


def _transform_nd(call: Call, input: Tensor, s: Any = None, dim: Any = None, norm: str | None = None) -> Layout:
    first = -input.ndim if s is None else -len(s)
    return apart_from(call, input, *range(first, 0) if dim is None else (dim,))


def _shift(call: Call, input: Tensor, dim: Any = None) -> Layout:
    return apart_from(call, input, *range(input.ndim) if dim is None else (dim,))


def _part(call: Call, input: Tensor) -> Layout:
    """Functions from complex numbers to their parts or conjugates. Both parts lie along a new last dimension."""
    return call.layout_of(input)


def _of_parts(call: Call, input: Tensor) -> Layout:
    return call.layout_before(input, 1)


def _absolute(call: Call, input: Tensor, **named: Any) -> Layout:
    if input.is_complex():
        raise Ineligible("is not affine for complex numbers")
    return call.layout_of(input)


def _transforms(suffix: str, *names: str) -> list[Any]:
    return [getattr(torch.fft, name + suffix) for name in names]


_REAL, _ANY = ("rfft", "irfft", "hfft", "ihfft"), ("fft", "ifft")
SPECTRA: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys(functions("istft"), _istft),
    **dict.fromkeys(_transforms("", *_ANY, *_REAL), _transform),
    **dict.fromkeys(_transforms("2", *_ANY, *_REAL), _transform_2d),
    **dict.fromkeys(_transforms("n", *_ANY, *_REAL), _transform_nd),
    **dict.fromkeys((torch.fft.fftshift, torch.fft.ifftshift), _shift),
    **dict.fromkeys(functions("view_as_real", "real", "imag"), _part),
    **dict.fromkeys(functions("view_as_complex"), _of_parts),
    **dict.fromkeys(functions("conj", "conj_physical", "resolve_conj", "resolve_neg"), _part),
    **dict.fromkeys(functions("abs", "absolute"), _absolute),
}
STFT = dict.fromkeys(functions("stft"), _stft)
