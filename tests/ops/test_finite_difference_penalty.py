"""kind="r1-finite-difference": the exact value, and a gradient whose error is of the second order in the step."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import fastgan
from fastgan.nn import GradientPenalty

KIND = "r1-finite-difference"


def convolutional(*norms, norm=lambda layer: layer, activation=nn.SiLU):
    layers = norm(nn.Conv2d(3, 6, 4, 2, 1)), *norms, activation(), norm(nn.Conv2d(6, 5, 3)), activation()
    return nn.Sequential(*layers, nn.Flatten(), norm(nn.Linear(20, 1)))


class Halves(nn.Module):
    """Logits of two scales."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 1, 3)

    def forward(self, x):
        return [self.conv(x).sigmoid(), self.conv(F.avg_pool2d(x, 2)).sigmoid()]


MODELS = {
    "smooth": convolutional,
    "batch norm": lambda: convolutional(nn.BatchNorm2d(6)),
    "spectral norm": lambda: convolutional(norm=parametrizations.spectral_norm),
    "dropout": lambda: convolutional(nn.Dropout(0.5)),
    "scales": Halves,
}


def gradients(model, loss):
    return torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)


def exact(model, x, **options):
    """All forwards use the same random numbers and buffers."""
    torch.manual_seed(1)
    return fastgan.gradient_penalty(model, x, kind="r1", **options)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_value_and_gradients_are_those_of_r1(name, dtype, reduction):
    theirs = MODELS[name]().double()
    ours = copy.deepcopy(theirs).to(dtype)
    x = torch.randn(5, 3, 8, 8, dtype=torch.float64)
    expected = exact(theirs, x, weight=3.0, reduction=reduction)
    torch.manual_seed(1)
    actual = fastgan.gradient_penalty(ours, x.to(dtype), kind=KIND, weight=3.0, reduction=reduction)
    tight = dtype == torch.float64
    torch.testing.assert_close(actual.double(), expected, rtol=1e-10 if tight else 1e-5, atol=0)
    for mine, wanted in zip(gradients(ours, actual), gradients(theirs, expected), strict=True):
        if wanted is None or wanted.norm() < 1e-9:  # a bias that R1 does not depend on
            continue
        assert (mine.double() - wanted).norm() <= (1e-7 if tight else 5e-3) * wanted.norm()


def test_the_error_is_of_the_second_order(monkeypatch):
    from fastgan.ops.gradient_penalty import differences as module

    model, x = convolutional().double(), torch.randn(5, 3, 8, 8, dtype=torch.float64)
    wanted = torch.cat([g.flatten() for g in gradients(model, exact(model, x))[:1]])
    errors = []
    for step in (0.2, 0.1):
        monkeypatch.setattr(module, "_step", lambda *_, step=step: torch.tensor(step, dtype=torch.float64))
        found = gradients(model, fastgan.gradient_penalty(model, x, kind=KIND))[0].flatten()
        errors.append((found - wanted).norm())
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.2)


class Once(torch.autograd.Function):
    """tanh without a second derivative."""

    @staticmethod
    def forward(ctx, x):
        y = x.tanh()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return g * (1 - ctx.saved_tensors[0] ** 2)


class Opaque(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function, self.first, self.head = function, nn.Linear(6, 8), nn.Linear(8, 1)

    def forward(self, x):
        return self.head(self.function(self.first(x)))


@pytest.mark.parametrize("once", [Once.apply, lambda x: checkpoint(torch.tanh, x, use_reentrant=False)])
@pytest.mark.parametrize("as_module", [True, False])
def test_layers_without_a_second_derivative(once, as_module):
    theirs = Opaque(torch.tanh).double()
    ours = Opaque(once).double()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(7, 6, dtype=torch.float64)
    call = ours if as_module else lambda v: ours(v)
    logits, penalty = fastgan.logits_and_penalty(call, x, kind=KIND)
    expected, exact = fastgan.logits_and_penalty(theirs, x, kind="r1")
    torch.testing.assert_close(logits, expected)
    found = gradients(ours, F.softplus(-logits).mean() + penalty)
    wanted = gradients(theirs, F.softplus(-expected).mean() + exact)
    for mine, their in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, their, rtol=1e-6, atol=1e-9)


class Casting(nn.Module):
    """A float32 model that computes in bfloat16."""

    def __init__(self, model, weights):
        super().__init__()
        self.model = model.to(weights)

    def forward(self, x):
        if next(self.model.parameters()).dtype == torch.bfloat16:
            return self.model(x.bfloat16()).float()
        with torch.autocast("cpu", torch.bfloat16):
            return self.model(x)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_the_step_fits_the_precision_in_which_the_model_computes(weights):
    model, x = convolutional(), torch.randn(5, 3, 8, 8)
    wanted = gradients(model, fastgan.gradient_penalty(model, x, kind="r1"))
    ours = Casting(copy.deepcopy(model), weights)
    found = gradients(ours, fastgan.gradient_penalty(ours, x, kind=KIND))
    for mine, their in zip(found, wanted, strict=True):
        if their is not None:
            assert (mine - their).norm() <= 0.1 * their.norm()


def test_several_inputs_and_dims():
    class Joint(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 4), nn.Linear(6, 4)

        def forward(self, pair):
            return (torch.tanh(self.a(pair["a"])) * self.b(pair["b"])).sum((1, 2))

    model = Joint().double()
    x = {"a": torch.randn(5, 2, 6, dtype=torch.float64), "b": torch.randn(5, 2, 6, dtype=torch.float64)}
    for dims in (None, (2,)):
        expected = gradients(model, fastgan.gradient_penalty(model, x, kind="r1", dims=dims))
        found = gradients(model, fastgan.gradient_penalty(model, x, kind=KIND, dims=dims))
        for mine, their in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, their, rtol=1e-6, atol=1e-9)


def test_the_model_is_left_as_after_one_forward():
    model = convolutional(nn.BatchNorm2d(6), nn.Dropout(0.3), norm=parametrizations.spectral_norm)
    other = copy.deepcopy(model)
    x = torch.randn(5, 3, 8, 8)
    torch.manual_seed(3)
    other(x)
    after = torch.rand(3)
    torch.manual_seed(3)
    buffers = list(model.buffers())
    fastgan.gradient_penalty(model, x, kind=KIND).backward()
    assert torch.equal(torch.rand(3), after)
    assert all(a is b for a, b in zip(buffers, model.buffers(), strict=True))
    for mine, their in zip(model.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(mine, their)


class Around:
    """An object that is no module, but calls one."""

    def __init__(self, model):
        self.parts = {"model": model}

    def __call__(self, x):
        return self.parts["model"](x)

    def logits(self, x):
        return self(x)


CALLABLES = {
    "lambda": lambda model: lambda x: model(x),
    "partial": lambda model: partial(model),
    "method": lambda model: model.forward,
    "object": Around,
    "method of an object": lambda model: Around(model).logits,
}


@pytest.mark.parametrize("name", CALLABLES)
def test_buffers_of_a_model_within_any_callable_are_restored(name):
    model = convolutional(nn.BatchNorm2d(6), nn.Dropout(0.3), norm=parametrizations.spectral_norm).double()
    other, x = copy.deepcopy(model), torch.randn(5, 3, 8, 8, dtype=torch.float64)
    torch.manual_seed(1)
    found = gradients(model, fastgan.gradient_penalty(CALLABLES[name](model), x, kind=KIND))
    wanted = gradients(other, exact(other, x))
    for mine, their in zip(found, wanted, strict=True):
        if their is not None:
            torch.testing.assert_close(mine, their, rtol=1e-6, atol=1e-8)
    for mine, their in zip(model.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(mine, their)


def test_a_learned_weight_gets_its_gradient():
    model, weight = convolutional().double(), torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    x = torch.randn(5, 3, 8, 8, dtype=torch.float64)
    (found,) = torch.autograd.grad(fastgan.gradient_penalty(model, x, kind=KIND, weight=weight), weight)
    torch.testing.assert_close(found, fastgan.gradient_penalty(model, x, kind="r1", weight=1.0).detach())


def test_as_a_module_and_where_the_gradient_is_zero():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
    nn.init.constant_(model[0].bias, -100.0)
    penalty = GradientPenalty(KIND)(model, torch.randn(5, 3))
    penalty.backward()
    assert penalty == 0
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_what_it_cannot_is_said():
    model, x = convolutional(), torch.randn(2, 3, 8, 8, requires_grad=True)
    with pytest.raises(ValueError, match="needs reduction 'mean' or 'sum'"):
        fastgan.gradient_penalty(model, x, kind=KIND, reduction="none")
    with pytest.raises(ValueError, match="use logits_and_penalty"):
        fastgan.penalty_from_logits(model(x), x, kind=KIND)
    with pytest.raises(ValueError, match="has no target"):
        fastgan.gradient_penalty(model, x, kind=KIND, target=1.0)
    with pytest.raises(ValueError, match="does not depend on its input"):
        fastgan.gradient_penalty(lambda v: model(v.detach()), x, kind=KIND)
    with torch.no_grad(), pytest.raises(RuntimeError, match="needs gradients"):
        fastgan.logits_and_penalty(model, x, kind=KIND)
