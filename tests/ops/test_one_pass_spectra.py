"""Fourier transforms and complex numbers: one pass if real and imaginary parts stay affine in the input."""

from __future__ import annotations

import pytest
import torch
from torch import fft, nn
from torch.nn import functional as F

import fastgan
from tests.ops.one_pass_problem import (
    Between,
    C,
    N,
    S,
    assert_at_the_floor,
    assert_exact,
    constant,
    images,
    parameter,
    uneven,
)

WINDOW = torch.hamming_window(16, dtype=torch.float64)


def complex_constant(*shape):
    return torch.complex(constant(*shape), constant(*shape).flip(-1))


def complex_parameter(*shape):
    return nn.Parameter(complex_constant(*shape))


def parts(z):
    return torch.cat([z.real, z.imag], 1)


def spectrogram(h, **how):
    """The input of EnCodec's discriminator: real and imaginary parts of a short-time transform of each signal."""
    signals = h.flatten(1).view(N * 2, -1)
    z = torch.stft(signals, 16, 4, window=WINDOW, return_complex=True, **how)
    return parts(z.view(N, 2, *z.shape[1:]))


def in_place(change):
    def between(net, h):
        z = fft.rfft2(h)
        change(z)
        return parts(z)

    return between


def filtered(net, h):
    """A layer of a Fourier neural operator."""
    z = fft.rfft2(h)
    mixed = torch.einsum("nchw,cdhw->ndhw", z[..., :3, :3], net.p)
    return h + fft.irfft2(F.pad(mixed, (0, z.shape[-1] - 3, 0, z.shape[-2] - 3)), s=h.shape[-2:])


FILTER = lambda: nn.Parameter(complex_constant(C, C, 3, 3) / 9)  # noqa: E731
TAKEN = {
    "rfft2 in parts": (lambda net, h: parts(fft.rfft2(h)), {}),
    "rfft as real": (lambda net, h: torch.view_as_real(fft.rfft(h, norm="ortho")).flatten(1), {}),
    "fft and back": (lambda net, h: fft.ifft(fft.fft(h, dim=1) * complex_constant(C, 1, 1), dim=1).real, {}),
    "fftn over channels": (lambda net, h: fft.fftn(h, dim=(1, 2, 3)).imag, {}),
    "rfftn of the last two": (lambda net, h: parts(fft.rfftn(h, s=(4, 6))), {}),
    "hfft": (lambda net, h: fft.hfft(torch.complex(h, h.flip(1))), {}),
    "ihfft": (lambda net, h: parts(fft.ihfft2(h)), {}),
    "shifted": (lambda net, h: parts(fft.ifftshift(fft.fftshift(fft.fft2(h), dim=(-2, -1)), dim=-1)), {}),
    "spectrogram": (lambda net, h: spectrogram(h), {}),
    "spectrogram, replicated": (lambda net, h: spectrogram(h, pad_mode="replicate", normalized=True), {}),
    "spectrogram, not centered": (lambda net, h: spectrogram(h, center=False, onesided=False), {}),
    "spectrogram by a learned window": (
        lambda net, h: parts(h.flatten(1).stft(8, 4, 8, net.p, return_complex=True)),
        {"p": lambda: parameter(8)},
    ),
    "filtered spectrogram and back": (
        lambda net, h: torch.istft(
            torch.stft(h.flatten(1), 16, 4, window=WINDOW, return_complex=True) * complex_constant(9, 1),
            *(16, 4),
            window=WINDOW,
        ),
        {},
    ),
    "Fourier neural operator": (filtered, {"p": FILTER}),
    "complex from parts": (lambda net, h: parts(torch.complex(h[:, :3], h[:, 3:]) * 1j).contiguous(), {}),
    "complex from a constant": (lambda net, h: parts(torch.complex(h, constant(C, S, S)) * (1 - 2j)), {}),
    "plus a complex constant": (lambda net, h: parts(h + complex_constant(C, 1, 1)), {}),
    "plus a complex number": (lambda net, h: parts((h + (1 + 2j)) * complex_constant(S)), {}),
    "plus a real number": (lambda net, h: parts(fft.fft(h) + 2.0), {}),
    "plus a complex parameter": (
        lambda net, h: parts(fft.fft(h) * net.p + net.p - net.q),
        {"p": lambda: complex_parameter(C, 1, S), "q": lambda: parameter(S)},
    ),
    "without its mean": (in_place(lambda z: z[..., :1, :1].zero_()), {}),
    "frequencies in place": (in_place(lambda z: z[..., 1:, :].mul_(2j).add_(1 - 1j)), {}),
    "frequencies written": (in_place(lambda z: z.__setitem__((..., 0), 1j)), {}),
    "real part scaled in place": (in_place(lambda z: z.real.mul_(2.0)), {}),
    "conjugates scaled in place": (in_place(lambda z: z.conj().mul_(1 + 2j)), {}),
    "conjugates added in place": (in_place(lambda z: z.add_(z.conj() + complex_constant(S, 1).conj())), {}),
    "conjugates added at indices": (
        in_place(lambda z: z.index_add_(1, torch.tensor([2, 0]), z[:, :2].conj() * 1j, alpha=2)),
        {},
    ),
    "conjugated": (lambda net, h: parts((fft.fft(h) + 1j).conj() * complex_constant(S)), {}),
    "as complex": (lambda net, h: parts(torch.view_as_complex(h.unflatten(3, (-1, 2))).resolve_conj()), {}),
    "cast": (lambda net, h: parts(h.to(torch.complex128) @ complex_constant(S, S)), {}),
}
REFUSED = {
    "over the samples": (lambda net, h: parts(fft.fft(h, dim=0)), "fft"),
    "over all": (lambda net, h: parts(fft.fftn(h)), "fftn"),
    "shifted samples": (lambda net, h: h + fft.fftshift(h), "fftshift"),
    "magnitude": (lambda net, h: fft.rfft2(h).abs(), "abs"),
    "power": (lambda net, h: fft.rfft2(h).abs().square(), "abs"),
    "real part moved in place": (in_place(lambda z: z.real.add_(1.0)), "through a view"),
    "parts moved in place": (in_place(lambda z: torch.view_as_real(z).add_(1.0)), "through a view"),
    "conjugates moved in place": (in_place(lambda z: z.conj().add_(1j)), "through a view"),
    "conjugates overwritten": (in_place(lambda z: z.conj().__setitem__((..., 0), 1j)), "through a view"),
    "conjugates masked": (
        lambda net, h: parts(fft.rfft2(h).conj().masked_fill_(torch.arange(5) == 0, 1j)),
        "masked_fill_",
    ),
    "conjugates raised": (lambda net, h: parts(fft.rfft2(h).conj().add_(1j)), "add_"),
    "imaginary parts of conjugates moved": (
        lambda net, h: torch.view_as_complex(h.unflatten(3, (-1, 2))).conj().imag.add_(1.0),
        "add_",
    ),
    "added with a complex alpha": (
        in_place(lambda z: z.index_add_(1, torch.tensor([2, 0]), z[:, :2] * 1, alpha=2j)),
        "index_add_",
    ),
    "phase": (lambda net, h: fft.rfft2(h).angle(), "angle"),
    "product with its conjugate": (lambda net, h: (fft.fft(h) * fft.fft(h).conj()).real, "mul"),
    "a window that depends on the input": (
        lambda net, h: parts(h.flatten(1).stft(8, 4, 4, h.mean((1, 2, 3)), return_complex=True)),
        "stft",
    ),
}


@pytest.mark.filterwarnings("ignore:istft will require")
@pytest.mark.parametrize("name", TAKEN)
def test_a_spectrum_is_exact_in_one_pass(name):
    between, parameters = TAKEN[name]
    model = Between(between, **{key: make() for key, make in parameters.items()})
    assert fastgan.explain_penalty(model, images()) == "one pass"
    assert_exact(model, images(), uneven)
    assert_at_the_floor(model, images())


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_affine_or_mixes_samples_is_refused_by_name_and_exact(name):
    model = Between(REFUSED[name][0])
    said = fastgan.explain_penalty(model, images())
    assert said.startswith("general path: ")
    assert REFUSED[name][1] in said
    assert_exact(model, images(), uneven)


def test_two_samples_are_not_taken_for_real_and_imaginary_parts():
    def between(net, h):
        if len(h) != 2:
            return h.flatten(1)[:, ::2]
        return torch.view_as_complex(h.flatten(1).t().contiguous()).reshape(-1, 2).t().imag

    model = Between(between)
    assert "view_as_complex" in fastgan.explain_penalty(model, images(2))
    assert_exact(model, images(2), uneven)
