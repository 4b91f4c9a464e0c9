"""target=, dims=, reduction=, a function as kind and learned weights, on every path to a penalty."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F

import fastgan
from fastgan.ops.gradient_penalty.kinds import Penalty
from tests.harness import assert_close
from tests.ops.penalty_problem import (
    CALLS,
    DISCRIMINATORS,
    N,
    affine,
    assert_equal,
    by_logits,
    gradients,
    images,
    input_gradient,
    norm,
)

OPTIONS = {
    "target": (dict(kind="wgan-gp", target=0.3, weight=2.0), lambda g: 2 * (norm(g) - 0.3).square().mean()),
    "target of a bound": (dict(kind="wgan-lp", target=0.01), lambda g: 10 * F.relu(norm(g) - 0.01).square().mean()),
    "target of each sample": (
        dict(kind="wgan-gp", target=torch.arange(N)),
        lambda g: 10 * (norm(g) - torch.arange(N)).square().mean(),
    ),
    "one dimension": (dict(kind="wgan-gp", dims=1), lambda g: 10 * (norm(g, 1) - 1).square().mean()),
    "dimensions from the end": (
        dict(kind="wgan-gp", dims=(-1, -2), target=0.1),
        lambda g: 10 * (norm(g, (2, 3)) - 0.1).square().mean(),
    ),
    "dimensions apart": (dict(kind="wgan-lp", dims=[1, 3], target=0), lambda g: 10 * norm(g, (1, 3)).square().mean()),
    "squares over a dimension": (dict(kind="r1", dims=2), lambda g: 5 * g.square().sum(2).mean()),
    "all dimensions": (dict(kind="zero-centered", dims=(3, 1, 2)), lambda g: 10 * g.square().sum((1, 2, 3)).mean()),
    "largest over a dimension": (dict(kind="max-gp", dims=1), lambda g: 10 * g.square().sum(1).max()),
    "sum": (dict(kind="wgan-gp", reduction="sum"), lambda g: 10 * (norm(g) - 1).square().sum()),
    "none": (dict(kind="r1", reduction="none", weight=3), lambda g: 1.5 * g.square().sum((1, 2, 3))),
    "none, over a dimension": (
        dict(kind="wgan-gp", reduction="none", dims=1, target=5),
        lambda g: 10 * (norm(g, 1) - 5).square(),
    ),
    "sum over a dimension": (dict(kind="r2", reduction="sum", dims=1), lambda g: 5 * g.square().sum()),
    "function": (dict(kind=lambda norms: norms.pow(6), weight=2.0), lambda g: 2 * norm(g).pow(6).mean()),
    "function over a dimension": (
        dict(kind=lambda norms: norms.cosh(), dims=1, reduction="sum"),
        lambda g: 10 * norm(g, 1).cosh().sum(),
    ),
    "norms themselves": (dict(kind=lambda norms: norms, weight=1, reduction="none"), norm),
    "weight that is a tensor": (
        dict(kind="r1", weight=torch.tensor(3)),
        lambda g: 1.5 * g.square().sum((1, 2, 3)).mean(),
    ),
}


@pytest.mark.parametrize("make", DISCRIMINATORS.values(), ids=DISCRIMINATORS)
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize(("options", "formula"), OPTIONS.values(), ids=OPTIONS)
def test_options_are_their_formulas(options, formula, call, make):
    assert_equal(call, make, formula, **options)


def test_dragan_has_a_target():
    assert_equal(by_logits, affine, lambda g: 10 * (norm(g) - 2).square().mean(), kind="dragan", target=2)


@pytest.mark.parametrize("name", DISCRIMINATORS)
def test_the_discriminators_of_these_tests_take_the_paths_that_they_are_named_after(name):
    assert fastgan.explain_penalty(DISCRIMINATORS[name](), images()).startswith(name)


@pytest.mark.small
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("name", ["target", "one dimension", "none", "function"])
def test_options_of_small_discriminators_are_alike(name, call):
    options, formula = OPTIONS[name]
    assert_equal(call, affine, formula, **options)


@pytest.mark.parametrize("dims", [None, 1, (2, 3), (1, 3), (1, 2, 3)])
@pytest.mark.parametrize("shape", [(3, 4, 5, 6), (3, 16, 32, 32)], ids=["few elements", "many elements"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("kind", ["wgan-gp", "r1"])
def test_norms_over_dimensions_of_any_layout(kind, layout, shape, dims):
    g = torch.randn(shape, dtype=torch.float64).contiguous(memory_format=layout)
    g[0] = 0  # the norm of zero; its derivative is taken as zero
    ours, exact = g.clone().requires_grad_(), g[1:].clone().requires_grad_()
    over = (1, 2, 3) if dims is None else dims
    squares = torch.cat([exact.square().sum(over), torch.zeros_like(g[:1].sum(over))])
    each = (
        (torch.where(squares > 0, squares, 1).sqrt() * (squares > 0) - 1).square() if kind == "wgan-gp" else squares / 2
    )
    actual = Penalty(kind, 3.0, dims=dims)((ours,))
    assert_close(actual, 3 * each.mean(), order=1)
    (by_ours,), (by_exact,) = torch.autograd.grad(actual, ours), torch.autograd.grad(3 * each.mean(), exact)
    assert not by_ours[0].any()
    assert_close(by_ours[1:], by_exact, order=1)


# Wrong values

BAD = {
    "kind": (dict(kind="r3"), ValueError, "kind must be one of wgan-gp, .* or a function of the norms, got 'r3'"),
    "no kind": (dict(kind=None), ValueError, "kind must be one of .*, got None"),
    "kind that returns a number": (dict(kind=lambda norms: 1.0), TypeError, "kind must return a tensor .*, got float"),
    "kind that reduces": (
        dict(kind=lambda norms: norms.mean()),
        ValueError,
        r"one penalty per norm, of shape \(5,\), got \(\): reduction=",
    ),
    "weight": (dict(weight="10"), TypeError, "weight must be a number or a tensor of real numbers, got '10'"),
    "weight of a shape": (dict(weight=torch.ones(1)), ValueError, r"a tensor of shape \(\), got shape \(1,\)"),
    "complex weight": (dict(weight=1j), TypeError, "weight must be a number or a tensor of real numbers, got 1j"),
    "target": (dict(kind="wgan-gp", target="1"), TypeError, "target must be a number or a tensor .*, got '1'"),
    "target of a shape": (
        dict(kind="wgan-gp", target=torch.ones(3)),
        ValueError,
        r"target must broadcast to the norms, \(5,\), got shape \(3,\)",
    ),
    "target of too many dimensions": (
        dict(kind="wgan-gp", target=torch.ones(N, 1)),
        ValueError,
        r"target must broadcast to the norms, \(5,\), got shape \(5, 1\)",
    ),
    "target of squares": (dict(kind="r1", target=1.0), ValueError, r"kind 'r1' has no target, got target=1\.0"),
    "target of a function": (dict(kind=lambda n: n, target=1), ValueError, "a function has no target, got target=1"),
    "dims": (dict(dims="1"), TypeError, "dims must be an integer or a tuple of integers, got '1'"),
    "dims with the samples": (dict(dims=(0, 1)), ValueError, r"other than the first \(the samples\), got \(0, 1\)"),
    "dims with the samples from the end": (dict(dims=-4), ValueError, r"none of them the first .*, got dims=\(-4,\)"),
    "dims that are not there": (dict(dims=4), ValueError, r"got dims=\(4,\) for inputs of 4 dimensions"),
    "dims twice": (dict(dims=(1, -3)), ValueError, r"different dimensions .*, got dims=\(1, -3\)"),
    "no dims": (dict(dims=()), ValueError, r"dims must name dimensions of the inputs .*, got \(\)"),
    "dims of a boolean": (dict(dims=True), TypeError, "dims must be an integer or a tuple of integers, got True"),
    "reduction": (dict(reduction="average"), ValueError, "reduction must be 'mean', 'sum' or 'none', got 'average'"),
    "no reduction": (dict(reduction=None), ValueError, "reduction must be 'mean', 'sum' or 'none', got None"),
    "reduction of the largest": (
        dict(kind="max-gp", reduction="none"),
        ValueError,
        "kind 'max-gp' returns the largest penalty in the batch: leave reduction out, got 'none'",
    ),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize(("change", "error", "message"), BAD.values(), ids=BAD)
def test_bad_values_are_named(change, error, message, call):
    with pytest.raises(error, match=message):
        call(affine(), images(), **{"kind": "zero-centered", **change})


# Learned weights, targets and functions


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("make", DISCRIMINATORS.values(), ids=DISCRIMINATORS)
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_what_is_learned_in_a_penalty_gets_its_gradient(call, make, reduction):
    discriminator, x = make(), images()
    exact = copy.deepcopy(discriminator)
    learned = {name: torch.tensor(value, requires_grad=True) for name, value in (("w", 3.0), ("t", 0.4), ("p", 1.5))}
    twins = {name: value.detach().double().requires_grad_() for name, value in learned.items()}
    norms = norm(input_gradient(exact, x))
    reduce = torch.mean if reduction == "mean" else (lambda each: each)
    for options, formula in (
        (dict(kind="r1", weight=learned["w"]), lambda: twins["w"] / 2 * reduce(norms.square())),
        (
            dict(kind="wgan-gp", weight=learned["w"], target=learned["t"]),
            lambda: twins["w"] * reduce((norms - twins["t"]).square()),
        ),
        (dict(kind=lambda n: n ** learned["p"], weight=2), lambda: 2 * reduce(norms ** twins["p"])),
    ):
        for tensor in (*learned.values(), *twins.values()):
            tensor.grad = None
        actual, expected = call(discriminator, x, reduction=reduction, **options), formula()
        assert actual.dtype == torch.float64
        ours = gradients(discriminator, actual.sin().sum())
        exact.zero_grad()
        expected.sin().sum().backward(retain_graph=True)
        assert_close(ours, torch.cat([p.grad.flatten() if p.grad is not None else torch.zeros(p.numel())
                                      for p in exact.parameters()]), order=2)  # fmt: skip
        for name, twin in twins.items():
            assert (learned[name].grad is None) == (twin.grad is None), name
            if twin.grad is not None:
                assert learned[name].grad.dtype == torch.float32
                assert_close(learned[name].grad, twin.grad, order=2)


@pytest.mark.small
def test_a_learned_weight_of_a_small_discriminator_gets_its_gradient():
    weight = torch.tensor(3.0, requires_grad=True)
    for call in CALLS.values():
        weight.grad = None
        penalty = call(affine(), images(), kind="r1", weight=weight)
        penalty.backward()
        torch.testing.assert_close(weight.grad.double(), penalty.detach() / 3, rtol=1e-6, atol=0)


def test_a_learned_weight_of_two_points_gets_the_gradient_of_both():
    weight = torch.tensor(3.0, requires_grad=True)
    penalty = fastgan.gradient_penalty(affine(), images(), images(), kind="r1+r2", weight=weight)
    penalty.backward()
    torch.testing.assert_close(weight.grad.double(), penalty.detach() / 3, rtol=1e-6, atol=0)
