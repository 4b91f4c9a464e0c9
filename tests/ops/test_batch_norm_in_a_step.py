"""Losses and penalties of a discriminator with BatchNorm, in any order of calls, with one backward."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastgan
from fastgan import ops
from fastgan.ops import norm as norms

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


@pytest.fixture(autouse=True)
def kernels_at_any_size(monkeypatch):
    monkeypatch.setattr(norms, "_LEAST", 0)


def discriminator_of(norm, n=2):
    size = (17, 8, 6)[n - 1]
    features = 6 * (size - 2) ** n
    return nn.Sequential(CONVS[n](3, 6, 3), norm, nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(features, 1)).double()


def images(n=2, seed=1):
    size = (17, 8, 6)[n - 1]
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(5, 3, *[size] * n, generator=generator, dtype=torch.float64)


def r1(model, x):
    x = x.clone().requires_grad_()
    logits = model(x)
    (grad,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
    return logits, 5 * grad.square().flatten(1).sum(1).mean()


def rerouted(model, x):
    with fastgan.twice_differentiable():
        return F.softplus(model(x)).mean()


def loss_and_penalty(model, x):
    logits, penalty = fastgan.logits_and_penalty(model, x, kind="r1", weight=10)
    return F.softplus(logits).mean() + penalty


def loss_and_r1(model, x):
    logits, penalty = r1(model, x)
    return F.softplus(logits).mean() + penalty


def from_logits(model, x):
    x = x.clone().requires_grad_()
    with fastgan.twice_differentiable():
        logits = model(x)
    return fastgan.penalty_from_logits(logits, x, kind="r1", weight=10)


def without_gradients(model, x):
    with torch.no_grad():
        return model(x).sum()


# Each letter is a call: fastgan's, and PyTorch's with the same result.
CALLS = {
    "l": (lambda model, x: F.softplus(model(x)).mean(),) * 2,
    "c": (rerouted, lambda model, x: F.softplus(model(x)).mean()),
    "p": (lambda model, x: fastgan.gradient_penalty(model, x, kind="r1", weight=10), lambda model, x: r1(model, x)[1]),
    "f": (from_logits, lambda model, x: r1(model, x)[1]),
    "b": (loss_and_penalty, loss_and_r1),
    "n": (without_gradients,) * 2,
}
ORDERS = ("llp", "pl", "lcpl", "bb", "bpb", "lbl", "pp", "ff", "cfl", "clnp", "nlpn")


def step(model, order, which, modes=""):
    """Gradients and buffers after the calls in this order, summed, and one backward."""
    total = torch.zeros((), dtype=torch.float64)
    for i, letter in enumerate(order):
        if modes:
            model.train(modes[i] == "t")
        total = total + CALLS[letter][which](model, images(len(model[0].kernel_size), seed=i))
    total.backward()
    # A penalty does not depend on some parameters. None and zeros are both correct here.
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return grads, dict(model.named_buffers())


def assert_same_step(model, order, modes="", convert=False):
    twin = copy.deepcopy(model)
    expected, expected_buffers = step(twin, order, 1, modes)
    if convert:
        fastgan.convert(model)
    actual, buffers = step(model, order, 0, modes)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-11)
    assert buffers.keys() == expected_buffers.keys()
    for name, buffer in buffers.items():
        torch.testing.assert_close(buffer, expected_buffers[name], rtol=1e-12, atol=1e-14, msg=name)


@pytest.mark.parametrize("convert", [False, True])
@pytest.mark.parametrize("order", ORDERS)
def test_losses_and_penalties_in_any_order_have_pytorchs_gradients_and_buffers(order, convert):
    assert_same_step(discriminator_of(nn.BatchNorm2d(6)), order, convert=convert)


OPTIONS = [{"momentum": None}, {"track_running_stats": False}, {"affine": False}, {"momentum": 1.0, "eps": 0.1}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("n", [1, 2, 3])
def test_options_and_dimensions(n, options):
    assert_same_step(discriminator_of(NORMS[n](6, **options), n), "lbcpl")


def test_frozen_weights_of_a_norm():
    norm = nn.BatchNorm2d(6)
    norm.weight.requires_grad_(False)
    assert_same_step(discriminator_of(norm), "lbcp")


def test_sync_batch_norm_in_one_process():
    assert_same_step(discriminator_of(nn.SyncBatchNorm(6)), "lbcp")


# PyTorch's gradients of BatchNorm in evaluation are wrong if a call in training comes before the backward. The next
# test compares that order with a model that is never trained.
MODES = [(nn.BatchNorm2d, modes) for modes in ("ttee", "tttt", "eeee")]
MODES += [(nn.InstanceNorm2d, modes) for modes in ("tete", "eett", "tttt", "eeee")]


@pytest.mark.parametrize(("norm", "modes"), MODES)
def test_running_statistics_through_changes_of_mode(norm, modes):
    assert_same_step(discriminator_of(norm(6, affine=True, track_running_stats=True)), "cpbc", modes)


def test_a_call_in_evaluation_keeps_its_statistics_through_later_training():
    model = discriminator_of(nn.BatchNorm2d(6))
    with torch.no_grad():
        model(images(seed=7))
    evaluated = copy.deepcopy(model).eval()
    expected = torch.autograd.grad(CALLS["p"][1](evaluated, images()), evaluated[0].weight)
    penalty = CALLS["p"][0](model.eval(), images())
    before = model[1].running_mean.clone()
    model.train()
    with fastgan.twice_differentiable():
        model(images(seed=3))
    assert not torch.equal(model[1].running_mean, before)
    torch.testing.assert_close(torch.autograd.grad(penalty, model[0].weight), expected)


def test_functional_batch_norm_shares_buffers_between_calls():
    """F.batch_norm and torch.batch_norm on the same running statistics, within fastgan and outside."""
    x, weight, bias = images().requires_grad_(), torch.rand(3).double(), torch.rand(3).double()
    results = []
    for inside in (False, True):
        mean, var = torch.zeros(3).double(), torch.ones(3).double()

        def call(which, mean=mean, var=var):
            if which == 0:
                return F.batch_norm(x, mean, var, weight, bias, True, 0.3)
            return torch.batch_norm(x, weight, bias, mean, var, True, 0.3, 1e-5, False)

        total = call(0).pow(3).sum()
        for which in (1, 0):
            if inside:
                with fastgan.twice_differentiable():
                    y = call(which)
            else:
                y = call(which)
            (grad,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
            total = total + grad.square().sum()
        results.append([*torch.autograd.grad(total, x), mean, var])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_a_loss_and_a_penalty_go_together(dtype):
    model = discriminator_of(nn.BatchNorm2d(6)).float()
    twin = copy.deepcopy(model)
    grads = []
    for m, which in ((model, 0), (twin, 1)):
        with torch.autocast("cpu", dtype):
            total = CALLS["l"][which](m, images().float()) + CALLS["p"][which](m, images(seed=2).float()).float()
        total.backward()
        grads.append(torch.cat([p.grad.flatten() for p in m.parameters() if p.grad is not None]))
    assert (grads[0] - grads[1]).norm() <= 0.05 * grads[1].norm()
    torch.testing.assert_close(model[1].running_var, twin[1].running_var, rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
def test_the_operator_renews_statistics_that_another_graph_saved(backend):
    x = images().requires_grad_()
    mean, var = torch.zeros(3).double(), torch.ones(3).double()
    first = F.batch_norm(x, mean, var, training=True).pow(3).sum()
    kept = mean.clone()
    ops.batch_norm(x, mean, var, training=True, backend=backend)
    assert not torch.equal(mean, kept)
    assert torch.autograd.grad(first, x)[0].isfinite().all()
