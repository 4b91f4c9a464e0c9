"""The calls in docs/conventions.md, evaluated as written there, against the formulas of papers and code bases."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastgan
from tests.harness import assert_close

PAGE = Path(__file__).resolve().parents[2] / "docs" / "conventions.md"
ROWS = {
    cells[0].strip(): cells[-1].strip().strip("`")
    for line in PAGE.read_text().splitlines()
    if line.startswith("| ") and line != "| convention | penalty | call |"
    for cells in [re.split(r"(?<!\\)\|", line.strip("| "))]
}
N, COLUMNS, PAC = 6, 5, 2


class Several(nn.Module):
    """Two heads, returned as a tuple."""

    def __init__(self, *heads):
        super().__init__()
        self.body, self.heads = nn.Conv2d(3, 4, 3, 2, 1), nn.ModuleList(heads)

    def forward(self, x):
        features = F.leaky_relu(self.body(x), 0.2)
        return tuple(head(features) for head in self.heads)


class OfLabels(nn.Module):
    """A projection discriminator."""

    def __init__(self):
        super().__init__()
        self.body, self.embed = nn.Sequential(nn.Conv2d(3, 4, 3), nn.LeakyReLU(0.2)), nn.Embedding(3, 4)

    def forward(self, x, labels):
        return (self.body(x).sum((2, 3)) * self.embed(labels)).sum(1, keepdim=True)


class OfText(nn.Module):
    """Images and sentences."""

    def __init__(self):
        super().__init__()
        self.image, self.text, self.head = nn.Conv2d(3, 4, 4, 4), nn.Linear(7, 4), nn.Linear(20, 1)

    def forward(self, x, sentence):
        parts = self.image(x).flatten(1), self.text(sentence)
        return self.head(F.leaky_relu(torch.cat(parts, 1), 0.2))


def mlp(width):
    return nn.Sequential(nn.Linear(width, 16), nn.LeakyReLU(0.2), nn.Linear(16, 1))


class Pac(nn.Module):
    """CTGAN's: rows are packed inside."""

    def __init__(self):
        super().__init__()
        self.seq = mlp(PAC * COLUMNS)

    def forward(self, rows):
        return self.seq(rows.view(-1, PAC * COLUMNS))


@pytest.fixture
def given():
    """The names that the calls use, in float64, with weights large enough for norms around one."""
    torch.manual_seed(3)
    real, fake = torch.randn(2, N, 3, 8, 8).double()
    flat = nn.Flatten()
    discriminators = {
        "D": nn.Sequential(nn.Conv2d(3, 8, 4, 2, 1), nn.LeakyReLU(0.2), flat, nn.Linear(128, 1)),
        "D_two": Several(
            nn.Sequential(flat, nn.Linear(64, 25)), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 1, 1))
        ),
        "D_star": Several(nn.Conv2d(4, 1, 3, 1, 1), nn.Sequential(flat, nn.Linear(64, 5))),
        "D_pac": Pac(),
        "D_text": OfText(),
        "D_labels": OfLabels(),
    }
    with torch.no_grad():
        for discriminator in discriminators.values():
            for parameter in discriminator.double().parameters():
                parameter.mul_(2.3)
    alpha = torch.rand_like(real)
    return {
        **discriminators,
        "real": real,
        "fake": fake,
        "rows": torch.randn(N, COLUMNS).double(),
        "fake_rows": torch.randn(N, COLUMNS).double(),
        "columns": COLUMNS,
        "pac": PAC,
        "sentences": torch.randn(N, 7).double(),
        "labels": torch.tensor([0, 1, 2, 2, 1, 0]),
        "points": alpha * real + (1 - alpha) * (real + 0.5 * real.std() * torch.rand_like(real)),
        "noisy": real + 0.3 * 0.5 * real.std() * torch.randn_like(real),
        "gamma": 4.0,
        "weight": 3.0,
        "bounds": torch.linspace(0.5, 1.5, N).double(),
        "gradient_penalty": fastgan.gradient_penalty,
        "logits_and_penalty": fastgan.logits_and_penalty,
        "GradientPenalty": fastgan.nn.GradientPenalty,
    }


def gradient(discriminator, *inputs):
    """The gradients as code bases compute them, with ones as the gradients of the outputs."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    output = discriminator(*inputs)
    grads = torch.autograd.grad(output, inputs, torch.ones_like(output), create_graph=True)
    return grads[0] if len(inputs) == 1 else grads


def uniform(*shape):
    """The alpha or the noise that the call draws first."""
    return torch.rand(*shape, dtype=torch.float64)


def x_hat(given):
    alpha = uniform(N, 1, 1, 1)
    return alpha * given["real"] + (1 - alpha) * given["fake"]


def norms(g):
    return g.reshape(len(g), -1).norm(2, dim=1)


def at_x_hat(penalty, discriminator="D"):
    return lambda given: penalty(gradient(given[discriminator], x_hat(given)))


def two_sided(g):
    return ((norms(g) - 1) ** 2).mean()


def lightweight(given):
    x = given["real"].requires_grad_()
    outputs = given["D_two"](x)
    (g,) = torch.autograd.grad(outputs, x, [torch.ones_like(output) for output in outputs], create_graph=True)
    return 10 * ((g.reshape(N, -1).norm(2, dim=1) - 1) ** 2).mean()


def lightweight_of_both(given):
    squares = []
    for name in ("real", "fake"):
        g = gradient(lambda x: sum(output.sum() for output in given["D_two"](x)), given[name])
        squares.append(norms(g) ** 2)
    return 10 * torch.cat(squares).mean()


def ctgan(given):
    real, fake = given["rows"], given["fake_rows"]
    alpha = uniform(N // PAC, 1, 1).repeat(1, PAC, COLUMNS).view(-1, COLUMNS)
    interpolates = alpha * real + (1 - alpha) * fake
    gradients = gradient(given["D_pac"], interpolates)
    return 10 * ((gradients.view(-1, PAC * COLUMNS).norm(2, dim=1) - 1) ** 2).mean()


def df_gan(given):
    images, sentences = gradient(given["D_text"], given["real"], given["sentences"])
    g = torch.cat((images.view(N, -1), sentences.view(N, -1)), dim=1)
    return 2.0 * torch.mean(torch.sqrt(torch.sum(g**2, dim=1)) ** 6)


def dragan(given):
    real = given["real"]
    noise = uniform(*real.shape)
    alpha = uniform(N, 1, 1, 1)
    return 10 * two_sided(gradient(given["D"], real + alpha * (0.5 * real.std() * noise)))


def r1(given, discriminator="D", at="real", *args):
    return gradient(lambda x: given[discriminator](x, *args), given[at]).square().sum([1, 2, 3])


FORMULAS = {
    "WGAN-GP, as in the paper (Gulrajani et al. 2017)": at_x_hat(lambda g: 10 * two_sided(g)),
    "caogang/wgan-gp": at_x_hat(lambda g: ((g.norm(2, dim=1) - 1) ** 2).mean() * 10),
    "norm over the whole batch (`g.norm()`)": at_x_hat(lambda g: 10 * (g.norm(2) - 1) ** 2),
    "Progressive GAN": at_x_hat(lambda g: ((norms(g) - 750) ** 2).mean() * (10 / 750**2)),
    "lucidrains, stylegan2-pytorch": lambda given: 10 * two_sided(gradient(given["D"], given["real"])),
    "lucidrains, lightweight-gan": lightweight,
    "stylegan2-pytorch 1.9": lambda given: sum(
        10 * (norms(gradient(given["D"], given[name])) ** 2).mean() for name in ("real", "fake")
    ),
    "lightweight-gan 1.2": lightweight_of_both,
    "CTGAN, PacGAN": ctgan,
    "StarGAN": lambda given: 10 * two_sided(gradient(lambda x: given["D_star"](x)[0], x_hat(given))),
    "WGAN-LP (Petzka et al. 2018)": at_x_hat(lambda g: 10 * (F.relu(norms(g) - 1) ** 2).mean()),
    "WGAN-div (Wu et al. 2018)": at_x_hat(lambda g: 2 * g.view(N, -1).pow(2).sum(1).pow(3).mean()),
    "DF-GAN, matching-aware": df_gan,
    "pix2pix and CycleGAN, `cal_gradient_penalty`": at_x_hat(lambda g: 10 * two_sided(g + 1e-16)),
    "1-GP": at_x_hat(two_sided),
    "0-GP (Thanh-Tung et al. 2019)": at_x_hat(lambda g: g.view(N, -1).square().sum(1).mean()),
    "Lipschitz GAN, StudioGAN MaxGP": at_x_hat(lambda g: 10 * torch.max(norms(g) ** 2)),
    "StudioGAN WGAN-GP": at_x_hat(lambda g: 10 * two_sided(g)),
    "StudioGAN DRAGAN, and the first DRAGAN code": dragan,
    "DRAGAN with alpha * x + (1 - alpha) * (x + noise), alpha for each pixel, the norm over channels": lambda given: (
        10 * ((gradient(given["D"], given["points"]).norm(2, dim=1) - 1) ** 2).mean()
    ),
    "DRAGAN with normal noise, one alpha for the batch": lambda given: (
        10 * two_sided(gradient(given["D"], given["noisy"]))
    ),
    "StudioGAN R1, StarGAN v2": lambda given: given["weight"] * 0.5 * r1(given).mean(),
    "GAN stability (Mescheder et al. 2018), its code": lambda given: given["weight"] * r1(given).mean(),
    "StyleGAN2-ADA, every 16th step": lambda given: (r1(given) * (given["gamma"] / 2)).mean() * 16,
    "StyleGAN2-ADA, labels": lambda given: (
        r1(given, "D_labels", "real", given["labels"]) * (given["gamma"] / 2)
    ).mean(),
    "R3GAN": lambda given: given["gamma"] / 2 * (r1(given) + r1(given, at="fake")),
    "a sum over the batch": at_x_hat(lambda g: 10 * ((norms(g) - 1) ** 2).sum()),
    "one-sided, with a bound for each sample": lambda given: (
        10 * F.relu(norms(gradient(given["D"], x_hat(given))) - given["bounds"]).square().mean()
    ),
}


def parameter_gradients(given, penalty):
    for value in given.values():
        if isinstance(value, nn.Module):
            value.zero_grad()
    (penalty * torch.arange(1, 1 + penalty.numel()).view(penalty.shape)).sum().backward()
    found = [p.grad.flatten() for value in given.values() if isinstance(value, nn.Module) for p in value.parameters()
             if p.grad is not None and p.grad.any()]  # fmt: skip
    return torch.cat(found)


def test_every_row_of_the_page_has_a_formula():
    assert list(ROWS) == list(FORMULAS)


@pytest.mark.parametrize("name", FORMULAS)
def test_the_call_equals_the_formula_in_value_and_gradient(name, given):
    exact = copy.deepcopy(given)
    torch.manual_seed(5)
    actual = eval(ROWS[name], given)
    torch.manual_seed(5)
    expected = FORMULAS[name](exact)
    assert actual.dtype == torch.float64
    assert expected.abs().max() > 0
    assert_close(actual, expected, order=1)
    assert_close(parameter_gradients(given, actual), parameter_gradients(exact, expected), order=2)


def logits_and_norms(discriminator, x):
    x = x.detach().requires_grad_()
    logits = discriminator(x).flatten()
    (g,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
    return logits, norms(g), x


def test_r3gans_step_is_the_sum_of_its_paper(given):
    D, exact, gamma = given["D"], copy.deepcopy(given["D"]), given["gamma"]
    (a, first), (b, second) = (
        fastgan.logits_and_penalty(D, given[at], kind=kind, weight=gamma)
        for at, kind in (("real", "r1"), ("fake", "r2"))
    )
    actual = F.softplus(b - a).mean() + first + second
    penalties = [r1({"D": exact, **{k: given[k] for k in ("real", "fake")}}, at=at) for at in ("real", "fake")]
    relativistic = exact(given["real"]) - exact(given["fake"])
    expected = (F.softplus(-relativistic).flatten() + (gamma / 2) * (penalties[0] + penalties[1])).mean()
    assert_close(actual, expected, order=1)
    assert_close(parameter_gradients({"D": D}, actual), parameter_gradients({"D": exact}, expected), order=2)


def test_gradient_normalization_by_norms_is_its_formula(given):
    D, exact = given["D"], copy.deepcopy(given["D"])
    logits, of_gradients = fastgan.logits_and_penalty(
        D, given["real"], kind=lambda norms: norms, weight=1, reduction="none"
    )
    actual = (logits.flatten() / (of_gradients + logits.flatten().abs())).mean()
    plain, plain_norms, _ = logits_and_norms(exact, given["real"])
    expected = (plain / (plain_norms + plain.abs())).mean()
    assert_close(actual, expected, order=1)
    assert_close(parameter_gradients({"D": D}, actual), parameter_gradients({"D": exact}, expected), order=2)


def test_gradient_normalization_has_a_gradient_for_the_generator(given):
    D, exact = given["D"], copy.deepcopy(given["D"])
    images = given["fake"].clone().requires_grad_()
    with fastgan.twice_differentiable():
        logits = D(images)
    of_gradients = fastgan.penalty_from_logits(logits, images, kind=lambda norms: norms, weight=1, reduction="none")
    (actual,) = torch.autograd.grad((logits.flatten() / (of_gradients + logits.flatten().abs())).sum(), images)
    plain, plain_norms, x = logits_and_norms(exact, given["fake"])
    (expected,) = torch.autograd.grad((plain / (plain_norms + plain.abs())).sum(), x)
    assert_close(actual, expected, order=2)
