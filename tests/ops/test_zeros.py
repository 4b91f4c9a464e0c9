"""Parameters that a penalty does not depend on get the same gradient as in PyTorch: zeros or None."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastgan
from fastgan.nn import GradientPenalty
from tests.harness import assert_close, one_rank
from tests.ops.test_piecewise import BETWEEN


class Residual(nn.Module):
    def __init__(self, channels, activation=F.relu):
        super().__init__()
        self.first, self.second = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.skip, self.activation = nn.Conv2d(channels, channels, 1), activation

    def forward(self, x):
        return F.avg_pool2d(self.second(self.activation(self.first(x))) + self.skip(x), 2)


class Scales(nn.Module):
    """Patch logits at two scales."""

    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList(
            nn.Sequential(nn.Conv2d(3, 4, 3), nn.LeakyReLU(0.2), nn.Conv2d(4, 1, 3)) for _ in range(2)
        )

    def forward(self, x):
        return [part(y) for part, y in zip(self.parts, (x, F.interpolate(x, (6, 6))), strict=True)]


class Tied(nn.Module):
    """One convolution three times: before an activation, and after the last."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x):
        return self.conv(F.leaky_relu(self.conv(self.conv(x)), 0.2)).flatten(1).sum(1)


class Added(nn.Module):
    """Parameters outside layers: before an activation, between two, and after the last."""

    def __init__(self):
        super().__init__()
        self.body = nn.ModuleList([nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.Conv2d(4, 4, 3, bias=False)])
        self.maps = nn.ParameterList([torch.randn(4, 1, 1), torch.randn(1, 4, 8, 8), torch.randn(4, 1, 1)])
        self.unused = nn.Parameter(torch.randn(3))

    def forward(self, x):
        y = F.leaky_relu(self.body[0](x) + self.maps[0], 0.2) + self.maps[1]
        return (self.body[1](F.max_pool2d(y, 2)) + self.maps[2]).flatten(1).sum(1)


class Branches(nn.Module):
    """A branch of a constant, which no gradient of the images reaches."""

    def __init__(self):
        super().__init__()
        self.body, self.side, self.head = nn.Linear(12, 8), nn.Linear(5, 8), nn.Linear(8, 1)

    def forward(self, x):
        return self.head(F.relu(self.body(x.flatten(1)) + F.relu(self.side(torch.ones(len(x), 5).to(x)))))


def sequence(*layers):
    return nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), *layers, nn.Flatten(), nn.Linear(4 * 16, 1))


def frozen():
    model = sequence(nn.LeakyReLU(0.2), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())
    model[0].weight.requires_grad_(False)
    model[2].bias.requires_grad_(False)
    return model


def only_biases():
    model = sequence(nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.ndim == 1)
    return model


DISCRIMINATORS = {
    "mlp": lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 1)),
    "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.Linear(8, 1)),
    "convolutions alone": lambda: sequence(nn.Conv2d(4, 4, 3, padding=1)),
    "leaky relu": lambda: sequence(nn.LeakyReLU(0.2), nn.Conv2d(4, 4, 3, padding=1), nn.LeakyReLU(0.2)),
    "relu in place": lambda: sequence(nn.ReLU(True), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(True)),
    "silu": lambda: sequence(nn.SiLU(), nn.Conv2d(4, 4, 3, padding=1), nn.LeakyReLU(0.2)),
    "silu above": lambda: sequence(nn.LeakyReLU(0.2), nn.Conv2d(4, 4, 3, padding=1), nn.SiLU()),
    "pool": lambda: nn.Sequential(nn.Conv2d(3, 4, 3, 1, 1), nn.AvgPool2d(2), nn.Conv2d(4, 1, 4), nn.Flatten(0)),
    "max pool": lambda: sequence(nn.MaxPool2d(3, 1, 1), nn.Conv2d(4, 4, 3, padding=1)),
    "clamped": lambda: sequence(nn.Conv2d(4, 4, 3, padding=1), nn.Identity(), nn.Hardtanh()),
    "residual": lambda: nn.Sequential(
        nn.Conv2d(3, 4, 1), Residual(4), Residual(4, torch.tanh), nn.Flatten(), nn.Linear(16, 1)
    ),
    "scales": Scales,
    "tied": Tied,
    "added": Added,
    "branches": lambda: nn.Sequential(nn.AdaptiveAvgPool2d(2), Branches()),
    "group norm": lambda: sequence(nn.GroupNorm(2, 4), nn.ReLU()),
    "layer norm": lambda: sequence(nn.LayerNorm([4, 4, 4]), nn.ReLU()),
    "layer norm above": lambda: sequence(nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.LayerNorm([4, 4, 4])),
    "batch norm": lambda: sequence(nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()),
    "batch norm in evaluation": lambda: sequence(nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1)).eval(),
    "batch norm in evaluation above": lambda: sequence(
        nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4).eval()
    ),
    "a frozen batch norm": lambda: sequence(
        nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4).eval().requires_grad_(False), nn.Conv2d(4, 4, 3, padding=1)
    ),
    "instance norm in evaluation above": lambda: sequence(
        nn.Conv2d(4, 4, 3, padding=1), nn.InstanceNorm2d(4, affine=True, track_running_stats=True).eval()
    ),
    "instance norm": lambda: sequence(nn.InstanceNorm2d(4, affine=True), nn.LeakyReLU(0.2)),
    "spectral norm": lambda: sequence(
        nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 4, 3, padding=1)), nn.LeakyReLU(0.2)
    ).eval(),
    "weight norm": lambda: sequence(
        nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3, padding=1)), nn.LeakyReLU(0.2)
    ),
    "frozen": frozen,
    "only biases": only_biases,
    "dropout": lambda: sequence(nn.Dropout(0.3), nn.LeakyReLU(0.2), nn.Conv2d(4, 4, 3, padding=1), nn.Dropout2d(0.3)),
    "patches": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 1, 3), nn.LeakyReLU(0.2)),
    "transposed": lambda: nn.Sequential(
        nn.ConvTranspose2d(3, 4, 2, 2), nn.PReLU(4), nn.Conv2d(4, 1, 16), nn.Flatten(0)
    ),
    **{
        f"between linear layers: {name}": lambda f=f: nn.Sequential(
            *(nn.Flatten(), nn.Linear(192, 8 * 64), nn.Unflatten(1, (8, 8, 8)), Called(f), nn.LazyLinear(1))
        )
        for name, f in BETWEEN.items()
        if name != "fractional_max_pool2d"
    },
}


class Called(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = copy.deepcopy(function)

    def forward(self, x):
        return self.function(x).flatten(1)


def images(n=4):
    torch.manual_seed(3)
    return torch.randn(n, 3, 8, 8, dtype=torch.float64)


def built(name):
    discriminator = DISCRIMINATORS[name]().double()
    discriminator(images())  # sizes of lazy layers
    return discriminator, copy.deepcopy(discriminator)


def by_pytorch(discriminator, x, weight=10.0):
    x = x.detach().requires_grad_()
    logits = discriminator(x)
    logits = sum(t.sum() for t in logits) if isinstance(logits, list) else logits.sum()
    (g,) = torch.autograd.grad(logits, x, create_graph=True)
    return weight / 2 * g.square().flatten(1).sum(1).mean()


def fused_from_logits(discriminator, x):
    x = x.clone().requires_grad_()
    with fastgan.twice_differentiable():
        logits = discriminator(x)
    return fastgan.penalty_from_logits(logits, x, kind="r1")


PENALTIES = {
    "gradient_penalty": lambda d, x: fastgan.gradient_penalty(d, x, kind="r1"),
    "logits_and_penalty": lambda d, x: fastgan.logits_and_penalty(d, x, kind="r1")[1],
    "penalty_from_logits": fused_from_logits,
    "module": lambda d, x: GradientPenalty("r1", 10.0)(d, x),
}
each_penalty = pytest.mark.parametrize("penalty", PENALTIES.values(), ids=PENALTIES)


def assert_same(discriminator, twin):
    for (name, p), q in zip(discriminator.named_parameters(), twin.parameters(), strict=True):
        left = ["None" if r.grad is None else "zeros" if not r.grad.any() else "values" for r in (p, q)]
        assert left[0] == left[1], f"{name}: {left[0]}, PyTorch gives {left[1]}"
        if q.grad is not None:
            assert_close(p.grad, q.grad, order=0)


@each_penalty
@pytest.mark.parametrize("name", DISCRIMINATORS)
def test_every_parameter_gets_the_same_gradient_as_in_pytorch(name, penalty):
    discriminator, twin = built(name)
    seeded()
    expected = by_pytorch(twin, images())
    seeded()
    actual = penalty(discriminator, images())
    assert actual.requires_grad == expected.requires_grad
    if expected.requires_grad:
        actual.backward(), expected.backward()
    assert_same(discriminator, twin)


def seeded():
    return torch.manual_seed(5)


@pytest.mark.parametrize("name", ["leaky relu", "mlp", "residual", "added", "scales", "group norm", "frozen", "tied"])
@each_penalty
def test_three_steps_of_only_a_penalty_equal_pytorchs(name, penalty):
    discriminator, twin = built(name)
    parameters = [[p for p in d.parameters() if p.requires_grad] for d in (discriminator, twin)]
    optimizers = [torch.optim.Adam(each, lr=0.01, betas=(0.5, 0.9)) for each in parameters]
    for step in range(3):
        if step == 1:  # build up momentum, which moves parameters with zero gradients
            for d, optimizer in zip((discriminator, twin), optimizers, strict=True):
                optimizer.zero_grad()
                logits = d(images())
                (
                    sum(t.square().mean() for t in logits) if isinstance(logits, list) else logits.square().mean()
                ).backward()
                optimizer.step()
        for d, optimizer, made in zip((discriminator, twin), optimizers, (penalty, by_pytorch), strict=True):
            optimizer.zero_grad()
            made(d, images()).backward()
            optimizer.step()
    for p, q in zip(discriminator.parameters(), twin.parameters(), strict=True):
        assert_close(p.detach(), q.detach(), order=0)


@each_penalty
def test_autograd_grad_returns_the_same_as_in_pytorch(penalty):
    discriminator, twin = built("leaky relu")
    chosen = [[p for n, p in d.named_parameters() if n != "5.bias"] for d in (discriminator, twin)]
    actual = torch.autograd.grad(penalty(discriminator, images()), chosen[0])
    for got, wanted in zip(actual, torch.autograd.grad(by_pytorch(twin, images()), chosen[1]), strict=True):
        assert_close(got, wanted, order=0)
        got.mul_(2)  # clipping writes into gradients
    with pytest.raises(RuntimeError, match="appears to not have been used"):
        torch.autograd.grad(penalty(discriminator, images()), discriminator[5].bias)


@each_penalty
def test_a_loss_in_the_same_backward_is_exact(penalty):
    discriminator, twin = built("leaky relu")
    (penalty(discriminator, images()) + discriminator(images()).square().mean()).backward()
    (by_pytorch(twin, images()) + twin(images()).square().mean()).backward()
    assert_same(discriminator, twin)


def test_r1_plus_r2_gives_zeros():
    discriminator, twin = built("leaky relu")
    fastgan.gradient_penalty(discriminator, images(), -images(), kind="r1+r2").backward()
    (by_pytorch(twin, images()) + by_pytorch(twin, -images())).backward()
    assert_same(discriminator, twin)


def test_parameter_hooks_run_once_and_receive_zeros():
    discriminator, _ = built("leaky relu")
    seen = []
    discriminator[0].bias.register_hook(lambda grad: seen.append(grad.abs().max().item()))
    discriminator[0].bias.register_post_accumulate_grad_hook(lambda p: seen.append("accumulated"))
    discriminator[5].bias.register_hook(lambda grad: seen.append("the last bias"))
    fastgan.gradient_penalty(discriminator, images(), kind="r1").backward()
    assert seen == [0.0, "accumulated"]


def test_zeros_accumulate_into_an_existing_gradient():
    discriminator, _ = built("leaky relu")
    discriminator[0].bias.grad = torch.ones(4, dtype=torch.float64)
    fastgan.gradient_penalty(discriminator, images(), kind="r1").backward()
    assert torch.equal(discriminator[0].bias.grad, torch.ones(4, dtype=torch.float64))


def test_gradients_of_a_penalty_support_create_graph():
    discriminator, twin = built("mlp")
    found = []
    for d, made in ((discriminator, PENALTIES["gradient_penalty"]), (twin, by_pytorch)):
        grads = torch.autograd.grad(made(d, images()), [d[1].weight, d[1].bias], create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in grads), [d[1].weight, d[1].bias, d[3].weight]))
    for got, wanted in zip(*found, strict=True):
        assert_close(got, wanted, order=0)


def test_a_parameter_may_be_modified_in_place_before_the_backward():
    discriminator, _ = built("leaky relu")
    penalty = fastgan.gradient_penalty(discriminator, images(), kind="r1")
    with torch.no_grad():
        discriminator[0].bias.add_(1)
    penalty.backward()
    assert not discriminator[0].bias.grad.any()


def test_a_generator_that_made_the_inputs_gets_the_same_gradients_as_in_pytorch():
    torch.manual_seed(0)
    generator = nn.Sequential(nn.Linear(5, 192), nn.Unflatten(1, (3, 8, 8))).double()
    other = copy.deepcopy(generator)
    discriminator, twin = built("leaky relu")
    z = torch.randn(4, 5, dtype=torch.float64)
    fakes = generator(z)
    with fastgan.twice_differentiable():
        logits = discriminator(fakes)
    fastgan.penalty_from_logits(logits, fakes, kind="r2").backward()
    fakes = other(z)
    (g,) = torch.autograd.grad(twin(fakes).sum(), fakes, create_graph=True)
    (5 * g.square().flatten(1).sum(1).mean()).backward()
    assert_same(discriminator, twin)
    assert_same(generator, other)


def test_the_inputs_get_no_zeros():
    discriminator, _ = built("leaky relu")
    x = images().requires_grad_()
    with fastgan.twice_differentiable():
        logits = discriminator(x)
    fastgan.penalty_from_logits(logits, x).backward()
    assert x.grad is None


def test_a_penalty_with_its_own_backward_works_under_ddp():
    discriminator, twin = built("leaky relu")
    for d in (discriminator, twin):
        d[5].bias = None
    with one_rank():
        parallel = nn.parallel.DistributedDataParallel(discriminator)
        for _ in range(2):  # DDP raises in the second forward if a parameter got no gradient in the first backward
            fastgan.gradient_penalty(parallel, images(), kind="r1").backward()
            by_pytorch(twin, images()).backward()
        del parallel
    assert_same(discriminator, twin)


@pytest.mark.small
def test_small_discriminators_get_zeros_too():
    discriminator, twin = built("mlp")
    fastgan.gradient_penalty(discriminator, images(), kind="r1").backward()
    by_pytorch(twin, images()).backward()
    assert_same(discriminator, twin)
