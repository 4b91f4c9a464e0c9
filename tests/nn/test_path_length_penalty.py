"""Path length regularization against StyleGAN2's formula in plain PyTorch, through the layers that generators have."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastgan
from fastgan.nn import PathLengthPenalty


class Styled(nn.Module):
    """Modulated, demodulated grouped convolutions, upsampling by a filter, noise, PixelNorm."""

    def __init__(self, modulations=3):
        super().__init__()
        self.constant = nn.Parameter(torch.randn(1, 5, 4, 4))
        self.weights = nn.ParameterList([torch.randn(5, 5, 3, 3), torch.randn(5, 5, 3, 3), torch.randn(3, 5, 1, 1)])
        self.styles = nn.ModuleList(nn.Linear(7, 5) for _ in self.weights)
        self.strength = nn.Parameter(torch.full((2,), 0.3))
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0])
        self.register_buffer("taps", (taps[:, None] * taps / 16).expand(5, 1, 4, 4).clone())
        self.register_buffer("noise", torch.randn(2, 1, 1, 8, 8))

    def modulated(self, x, i, w, demodulate, up=False):
        n, c, h, width = x.shape
        weight = self.weights[i] * self.styles[i](w)[:, None, :, None, None]  # (N, O, I, k, k)
        if demodulate:
            weight = weight * (weight.square().sum((2, 3, 4), keepdim=True) + 1e-8).rsqrt()
        x = x.reshape(1, n * c, h, width)
        if up:
            weight = weight.transpose(1, 2).flatten(0, 1)
            x = F.conv_transpose2d(x, weight, stride=2, groups=n)
            x = x.view(n, -1, *x.shape[2:])
            return F.conv2d(x, self.taps, padding=1, groups=x.shape[1])
        x = F.conv2d(x, weight.flatten(0, 1), padding=weight.shape[-1] // 2, groups=n)
        return x.view(n, -1, h, width)

    def forward(self, w):
        each = w.unbind(1) if w.ndim == 3 else [w] * 3
        x = self.constant.expand(len(w), -1, -1, -1)
        x = F.leaky_relu(self.modulated(x, 0, each[0], True, up=True) + self.strength[0] * self.noise[0], 0.2)
        x = x * (x.square().mean(1, keepdim=True) + 1e-8).rsqrt()  # PixelNorm
        x = F.leaky_relu(self.modulated(x, 1, each[1], True) + self.strength[1] * self.noise[1], 0.2)
        return self.modulated(x, 2, each[2], False)


def convolutional():
    layers = [nn.Unflatten(1, (7, 1, 1)), nn.ConvTranspose2d(7, 8, 4), nn.BatchNorm2d(8), nn.ReLU()]
    layers += [nn.ConvTranspose2d(8, 4, 4, 2, 1, groups=2), nn.GELU(), nn.Upsample(scale_factor=2, mode="bilinear")]
    return nn.Sequential(*layers, nn.Conv2d(4, 3, 3, padding=1, padding_mode="reflect"), nn.Tanh())


def volumes():
    return nn.Sequential(
        nn.Unflatten(1, (7, 1, 1, 1)), nn.ConvTranspose3d(7, 4, 3), nn.SiLU(), nn.ConvTranspose3d(4, 2, 3)
    )


CASES = {
    "styled": (Styled, (5, 7)),
    "styled, a latent for each layer": (Styled, (5, 3, 7)),
    "convolutional": (convolutional, (4, 7)),
    "volumes": (volumes, (3, 7)),
    "one sample": (Styled, (1, 3, 7)),
}


def plain(make, latents, average, seed, weight=2.0, decay=0.01):
    w = latents.clone().requires_grad_()
    images = make(w)
    torch.manual_seed(seed)
    noise = torch.randn_like(images) / images[0, 0].numel() ** 0.5
    (g,) = torch.autograd.grad((images * noise).sum(), w, create_graph=True)
    lengths = (g.square().sum(2).mean(1) if g.ndim == 3 else g.square().sum(1)).sqrt()
    average = average + decay * (lengths.detach().mean() - average)
    return weight * (lengths - average).square().mean(), average


def gradients(make, loss):
    parameters = list(make.parameters())
    grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=True)]


@pytest.mark.parametrize("case", CASES)
def test_values_gradients_and_average_are_those_of_the_formula(case):
    build, shape = CASES[case]
    ours = build().double()
    theirs = copy.deepcopy(ours)
    module, average = PathLengthPenalty(0.7, 0.1).double(), torch.zeros((), dtype=torch.float64)
    for seed in range(3):
        latents = torch.randn(shape, dtype=torch.float64)
        expected, average = plain(theirs, latents, average, seed, 0.7, 0.1)
        w = latents.clone().requires_grad_()
        with fastgan.twice_differentiable():
            images = ours(w)
        torch.manual_seed(seed)
        actual = module(images, w)
        assert actual.shape == ()
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=0)
        torch.testing.assert_close(module.average, average, rtol=1e-10, atol=0)
        for mine, wanted in zip(gradients(ours, actual), gradients(theirs, expected), strict=True):
            torch.testing.assert_close(mine, wanted, rtol=1e-8, atol=1e-11)


def test_latents_may_come_from_a_mapping_network_which_is_trained_too():
    mapping, make = nn.Linear(7, 7).double(), Styled().double()
    z = torch.randn(4, 7, dtype=torch.float64)
    parameters = [*mapping.parameters(), *make.parameters()]
    w = mapping(z)
    images = make(w)
    torch.manual_seed(0)
    noise = torch.randn_like(images) / 8
    (g,) = torch.autograd.grad((images * noise).sum(), w, create_graph=True)
    lengths = g.square().sum(1).sqrt()
    expected = 2 * (lengths - 0.01 * lengths.detach().mean()).square().mean() + images.mean()
    expected = torch.autograd.grad(expected, parameters, allow_unused=True)
    w = mapping(z)
    with fastgan.twice_differentiable():
        images = make(w)
    torch.manual_seed(0)
    actual = torch.autograd.grad(PathLengthPenalty().double()(images, w) + images.mean(), parameters, allow_unused=True)
    for mine, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-8, atol=1e-11)


def test_the_average_is_in_the_state_dict_and_stays_in_evaluation():
    module, make = PathLengthPenalty(), convolutional()
    w = torch.randn(4, 7, requires_grad=True)
    module(make(w), w)
    other = PathLengthPenalty()
    other.load_state_dict(module.state_dict())
    assert other.average == module.average > 0
    before = other.average.clone()
    other.eval()(make(w), w)
    assert other.average == before


def test_a_later_call_does_not_disturb_an_earlier_backward():
    module, make = PathLengthPenalty().double(), Styled().double()
    w = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    loss = module(make(w), w)
    expected = torch.autograd.grad(loss, list(make.parameters()), retain_graph=True, allow_unused=True)
    module(make(w), w)
    found = torch.autograd.grad(loss, list(make.parameters()), allow_unused=True)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True) if a is not None)


def test_half_precision_lengths_are_float32():
    make = convolutional().bfloat16()
    w = torch.randn(4, 7, dtype=torch.bfloat16, requires_grad=True)
    penalty = PathLengthPenalty()(make(w), w)
    assert penalty.dtype == torch.float32
    penalty.backward()
    assert all(p.grad is None or p.grad.dtype == torch.bfloat16 for p in make.parameters())


def test_a_generator_that_ignores_a_sample_has_no_nan():
    w = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    scale = nn.Parameter(torch.tensor([0.0, 1.0, 1.0, 1.0], dtype=torch.float64))
    images = (w * scale[:, None]).view(4, 7, 1, 1)
    PathLengthPenalty().double()(images, w).backward()
    assert torch.isfinite(scale.grad).all()


def test_what_is_wrong_is_said():
    make, module = convolutional(), PathLengthPenalty()
    w = torch.randn(4, 7, requires_grad=True)
    with pytest.raises(ValueError, match="do not depend on the latents"):
        module(make(w), w.detach().requires_grad_())
    with pytest.raises(ValueError, match="latents must require a gradient"):
        module(make(w), w.detach())
    with pytest.raises(ValueError, match="images must require a gradient"):
        module(make(w).detach(), w)
    with pytest.raises(ValueError, match=r"latents \(N, D\) or \(N, L, D\)"):
        module(make(w), w[:3])
    for images, latents in (([make(w)], w), (make(w), {"w": w}), ({"images": make(w)}, [w, w])):
        given = f"got {type(images).__name__} and {type(latents).__name__}: stack"
        with pytest.raises(TypeError, match=given):
            module(images, latents)
    with pytest.raises(ValueError, match="decay must be between"):
        PathLengthPenalty(decay=1.5)
    with torch.no_grad(), pytest.raises(RuntimeError, match="needs gradients"):
        module(make(w), w)
