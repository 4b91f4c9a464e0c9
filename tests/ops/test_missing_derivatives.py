"""Layers without a second derivative raise an error with their paths, and explain_penalty lists them."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import fastgan


class Detached(torch.autograd.Function):
    """sin, whose backward autograd cannot see."""

    @staticmethod
    def forward(ctx, x):
        ctx.x = x.detach()
        return x.sin()

    @staticmethod
    def backward(ctx, g):
        return torch.from_numpy(g.detach().numpy() * ctx.x.cos().numpy())


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return g * ctx.saved_tensors[0].cos()


class Refusing(torch.autograd.Function):
    """sin, whose backward PyTorch refuses to record."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, g):
        return torch.mul(g, ctx.saved_tensors[0].cos(), out=torch.empty_like(g))


class Seen(torch.autograd.Function):
    """sin, whose backward is in operations of PyTorch."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, g):
        return g * ctx.saved_tensors[0].cos()


class Flat(torch.autograd.Function):
    """A step, whose derivative is zero."""

    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, g):
        return torch.zeros_like(g)


def ctc(h):
    logs = h.view(len(h), 4, 2).transpose(0, 1).log_softmax(-1)
    n = len(h)
    return F.ctc_loss(
        logs, torch.ones(n, 2, dtype=torch.long), torch.full((n,), 4), torch.full((n,), 1), reduction="none"
    )


class Layer(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def model(*functions):
    blocks = [nn.Sequential(nn.Linear(8, 8), Layer(function)) for function in functions]
    return nn.Sequential(*blocks, nn.Linear(8, 1)).double()


LACKING = {
    "detached": (Detached.apply, "Detached is a custom autograd.Function"),
    "once": (Once.apply, "Once, whose backward has no derivative"),
    "refusing": (Refusing.apply, "Refusing, whose backward cannot be differentiated: mul(): functions with out="),
    "ctc": (lambda h: h + ctc(h)[:, None], "CtcLoss"),
    "reentrant": (lambda h: checkpoint(torch.sin, h, use_reentrant=True), "is a reentrant checkpoint"),
}
CALLS = {
    "gradient_penalty": lambda m, x: fastgan.gradient_penalty(m, x, kind="r1"),
    "logits_and_penalty": lambda m, x: fastgan.logits_and_penalty(m, x, kind="r1")[1],
}


@pytest.fixture
def x():
    return torch.randn(5, 8, dtype=torch.float64)


@pytest.mark.parametrize("name", LACKING)
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("small", [False, pytest.param(True, marks=pytest.mark.small)])
def test_the_error_names_the_layer_by_its_path(name, call, small, x):
    function, said = LACKING[name]
    discriminator = model(torch.tanh, function)
    for _ in range(2):  # the second call is as the first
        with pytest.raises(RuntimeError, match=r"1\.1 \(Layer\)") as error:
            CALLS[call](discriminator, x).backward()
        assert said in str(error.value)
        assert "0.1 (Layer)" not in str(error.value)
        # A reentrant checkpoint refuses torch.autograd.grad, which the approximate penalty calls too.
        assert ("r1-finite-difference" in str(error.value)) == (name != "reentrant")


def test_an_error_of_the_first_derivative_stays_as_it_is(x):
    def wrong(h):
        a = h.exp()
        b = a * 2
        a.add_(1)
        return b + a

    for call in CALLS.values():
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            call(model(wrong), x)


def test_an_error_of_the_forward_stays_as_it_is(x):
    calls = []

    def wrong(h):
        calls.append(h)
        return h @ h

    for call in CALLS.values():
        with pytest.raises(RuntimeError, match="cannot be multiplied"):
            call(model(wrong), x)
    assert len(calls) == len(CALLS)


def test_a_module_made_in_the_forward_is_named_by_the_one_around_it(x):
    discriminator = model(lambda h: Layer(Detached.apply)(h))
    with pytest.raises(RuntimeError, match=r"\n  0\.1 \(Layer\): Detached is a custom"):
        fastgan.gradient_penalty(discriminator, x, kind="r1")


def test_explain_lists_every_layer(x):
    said = fastgan.explain_penalty(model(Detached.apply, Once.apply, Seen.apply, LACKING["ctc"][0]), x)
    assert said.startswith("no penalty: 3 without a second derivative")
    for path in ("0.1", "1.1", "3.1"):
        assert f"{path} (Layer)" in said
    assert "2.1" not in said
    assert "0.1 (Layer)" in fastgan.explain_penalty(model(LACKING["reentrant"][0]), x)


@pytest.mark.parametrize("function", [Seen.apply, lambda h: h + Flat.apply(h)], ids=["seen", "flat"])
@pytest.mark.parametrize("call", CALLS)
def test_functions_that_autograd_sees_are_taken(function, call, x):
    discriminator = model(function)
    plain = model(torch.sin if function == Seen.apply else lambda h: h + h.detach().round())
    plain.load_state_dict(discriminator.state_dict())
    for _ in range(2):
        results = [torch.autograd.grad(CALLS[call](m, x), m[0][0].weight) for m in (discriminator, plain)]
        torch.testing.assert_close(*results)
    assert fastgan.explain_penalty(discriminator, x).startswith("general path")


def test_a_function_in_the_place_of_a_module_is_named_by_its_layers_class(x):
    inner = model(Detached.apply)
    with pytest.raises(RuntimeError, match=r"\n  Layer: Detached is a custom"):
        fastgan.gradient_penalty(lambda v: inner(v), x, kind="r1")


def test_after_an_error_a_good_model_is_taken_and_a_bad_one_is_still_refused(x):
    for _ in range(2):
        fastgan.gradient_penalty(model(Seen.apply), x, kind="r1").backward()
        with pytest.raises(RuntimeError, match="Detached"):
            fastgan.gradient_penalty(model(Detached.apply), x, kind="r1")


@pytest.mark.parametrize("name", ["detached", "once", "ctc"])
def test_the_approximate_penalty_takes_them(name, x):
    discriminator = model(LACKING[name][0])
    fastgan.gradient_penalty(discriminator, x, kind="r1-finite-difference").backward()
    assert discriminator[0][0].weight.grad.norm() > 0
