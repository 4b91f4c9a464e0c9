"""Each kind of penalty, for few elements (PyTorch's functions) and for many (fastgan's)."""

from __future__ import annotations

import pytest
import torch

from fastgan.ops.gradient_penalty.kinds import KINDS, penalize

OF_NORMS = {
    "wgan-gp": lambda norms: (norms - 1).square().mean(),
    "wgan-lp": lambda norms: (norms - 1).clamp(min=0).square().mean(),
    "max-gp": lambda norms: norms.max().square(),
    "zero-centered": lambda norms: norms.square().mean(),
    "dragan": lambda norms: (norms - 1).square().mean(),
    "r1": lambda norms: norms.square().mean() / 2,
    "r2": lambda norms: norms.square().mean() / 2,
    "r1+r2": lambda norms: norms.square().mean() / 2,
    "r1-finite-difference": lambda norms: norms.square().mean() / 2,
}
SIZES = {"few": (3, 5), "many": (3, 1 << 7, 1 << 6)}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_derivatives_are_those_of_the_norms(kind, size, dtype):
    grad = torch.randn(SIZES[size], dtype=torch.float64).to(dtype)
    grad[0] = 0  # the norm of zero; its derivative is taken as zero
    ours, exact = grad.clone().requires_grad_(), grad[1:].double().requires_grad_()
    penalty = penalize(kind, ours, 3.0)
    norms = torch.cat([exact.new_zeros(1), exact.flatten(1).square().sum(1).sqrt()])
    expected = 3.0 * OF_NORMS[kind](norms)
    assert penalty.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    close = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(penalty.double(), expected, **close)
    (by_ours,) = torch.autograd.grad(penalty, ours)
    (by_exact,) = torch.autograd.grad(expected, exact)
    assert by_ours.dtype == dtype
    assert not by_ours[0].any()
    rounding = {"rtol": 4 * torch.finfo(dtype).eps, "atol": torch.finfo(dtype).tiny} if dtype.itemsize == 2 else close
    torch.testing.assert_close(by_ours[1:].double(), by_exact, **rounding)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["wgan-gp", "r1"])
def test_squares_that_overflow_half_precision_do_not(kind, size):
    grad = torch.full(SIZES[size], 300.0, dtype=torch.float16)
    with torch.autocast("cpu", torch.float16):
        assert penalize(kind, grad, 1.0).isfinite()
