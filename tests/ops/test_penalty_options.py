"""target=, dims=, reduction=, a function as kind, several inputs and learned weights, on every path to a penalty."""

from __future__ import annotations

import copy
from collections import OrderedDict, namedtuple

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastgan
from fastgan.nn import GradientPenalty
from fastgan.ops.gradient_penalty.kinds import Penalty
from tests.harness import assert_close

N = 5
Pair = namedtuple("Pair", ["image", "text"])


def affine():
    return nn.Sequential(nn.Conv2d(3, 6, 4, 2, 1), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(96, 1)).double()


def curved():
    return nn.Sequential(nn.Conv2d(3, 6, 4, 2, 1), nn.Softplus(), nn.Flatten(), nn.Linear(96, 1)).double()


def images(n=N):
    return 2 * torch.randn(n, 3, 8, 8, dtype=torch.float64)


def by_logits(discriminator, x, **options):
    x = x.detach().requires_grad_()
    with fastgan.twice_differentiable():
        logits = discriminator(x)
    return fastgan.penalty_from_logits(logits, x, **options)


def at_fakes(discriminator, x, kind, **options):
    """Interpolates of x and x, for kinds that need a fake."""
    return fastgan.gradient_penalty(discriminator, x, x, kind=kind, **options)


def module(discriminator, x, **options):
    return GradientPenalty(**options)(discriminator, x, x)


CALLS = {
    "gradient_penalty": at_fakes,
    "logits_and_penalty": lambda D, x, **options: fastgan.logits_and_penalty(D, x, **options)[1],
    "penalty_from_logits": by_logits,
    "GradientPenalty": module,
}
DISCRIMINATORS = {"one pass": affine, "general path": curved}


def input_gradient(discriminator, x):
    x = x.detach().requires_grad_()
    return torch.autograd.grad(discriminator(x).sum(), x, create_graph=True)[0]


def gradients(modules, loss):
    modules.zero_grad()
    loss.backward()
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in modules.parameters()])


def assert_equal(call, make, formula, **options):
    discriminator, x = make(), images()
    exact = copy.deepcopy(discriminator)
    actual, expected = call(discriminator, x, **options), formula(input_gradient(exact, x))
    assert expected.abs().min() > 0
    assert_close(actual, expected, order=1)
    assert_close(gradients(discriminator, actual.sin().sum()), gradients(exact, expected.sin().sum()), order=2)


def norm(g, dims=(1, 2, 3)):
    return g.square().sum(dims).sqrt()


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
    g[0] = 0  # whose norm has no derivative: it is zero
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


# Several inputs


class OfPair(nn.Module):
    """An image (N, 3, 8, 8), a text (N, 7) and a label (N,), from whatever holds them."""

    def __init__(self, unpack, activation):
        super().__init__()
        self.image, self.text, self.embed = nn.Conv2d(3, 4, 4, 4), nn.Linear(7, 16), nn.Embedding(3, 16)
        self.head, self.unpack, self.activation = nn.Linear(32, 1), unpack, activation

    def forward(self, inputs):
        image, text, label = self.unpack(inputs)
        text = self.text(text) if label is None else self.text(text) + self.embed(label)
        return self.head(self.activation(torch.cat([self.image(image).flatten(1), text], 1)))


FORMS = {
    "tuple": (lambda *parts: parts, lambda held: held),
    "list": (lambda *parts: list(parts), lambda held: held),
    "dict": (
        lambda image, text, label: {"label": label, "text": text, "image": image},
        lambda held: (held["image"], held["text"], held["label"]),
    ),
    "ordered dict": (
        lambda image, text, label: OrderedDict(image=image, text=text, label=label),
        lambda held: tuple(held.values()),
    ),
    "named tuple": (lambda image, text, label: Pair(image, text), lambda held: (held.image, held.text, None)),
}
ACTIVATIONS = {"affine": nn.LeakyReLU(0.2), "curved": nn.Softplus()}


def pairs(form):
    pack = FORMS[form][0]
    label = torch.arange(N) % 3
    return [pack(images(), torch.randn(N, 7, dtype=torch.float64), label) for _ in range(2)]


def two_gradients(discriminator, inputs, form):
    pack, unpack = FORMS[form]
    image, text, label = unpack(inputs)
    image, text = image.clone().requires_grad_(), text.clone().requires_grad_()
    return torch.autograd.grad(discriminator(pack(image, text, label)).sum(), (image, text), create_graph=True)


def joint(grads):
    return torch.cat([g.flatten(1) for g in grads], 1).norm(dim=1)


def require_gradients(held):
    for tensor in held.values() if isinstance(held, dict) else held:
        if tensor.is_floating_point():
            tensor.requires_grad_()
    return held


def several_by_logits(discriminator, held, **options):
    require_gradients(held)
    with fastgan.twice_differentiable():
        logits = discriminator(held)
    return fastgan.penalty_from_logits(logits, held, **options)


SEVERAL = {
    "gradient_penalty": lambda D, held, **options: fastgan.gradient_penalty(D, held, **options),
    "logits_and_penalty": CALLS["logits_and_penalty"],
    "penalty_from_logits": several_by_logits,
    "GradientPenalty": lambda D, held, **options: GradientPenalty(**options)(D, held),
}


@pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=ACTIVATIONS)
@pytest.mark.parametrize("call", SEVERAL.values(), ids=SEVERAL)
@pytest.mark.parametrize("form", FORMS)
def test_one_norm_is_over_all_inputs_that_are_floating(form, call, activation):
    discriminator = OfPair(FORMS[form][1], activation).double()
    exact, (held, _) = copy.deepcopy(discriminator), pairs(form)
    for options, formula in (
        (dict(kind="r1", weight=2), lambda norms: norms.square().mean()),
        (dict(kind=lambda norms: norms.pow(6), weight=2), lambda norms: 2 * norms.pow(6).mean()),
    ):
        expected = formula(joint(two_gradients(exact, held, form)))
        actual = call(discriminator, held, **options)
        assert_close(actual, expected, order=1)
        assert_close(gradients(discriminator, actual), gradients(exact, expected), order=2)


@pytest.mark.parametrize("form", FORMS)
def test_a_loss_and_a_penalty_of_several_inputs_are_exact(form):
    discriminator = OfPair(FORMS[form][1], nn.LeakyReLU(0.2)).double()
    exact, (held, _) = copy.deepcopy(discriminator), pairs(form)
    logits, penalty = fastgan.logits_and_penalty(discriminator, held, kind="wgan-gp", weight=2)
    expected = 2 * (joint(two_gradients(exact, held, form)) - 1).square().mean() + F.softplus(exact(held)).mean()
    actual = F.softplus(logits).mean() + penalty
    assert_close(gradients(discriminator, actual), gradients(exact, expected), order=2)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["wgan-gp", "dragan", "r1+r2", "r2"])
def test_points_are_drawn_for_each_tensor_with_one_alpha_a_sample(kind, form):
    pack, unpack = FORMS[form]
    discriminator = OfPair(unpack, nn.LeakyReLU(0.2)).double()
    real, fake = pairs(form)
    (image, text, label), (fake_image, fake_text, _) = unpack(real), unpack(fake)
    torch.manual_seed(4)
    actual = fastgan.gradient_penalty(discriminator, real, fake, kind=kind, weight=2)
    torch.manual_seed(4)
    if kind == "wgan-gp":
        alpha = torch.rand(N, dtype=torch.float64)
        wide, narrow = alpha.view(N, 1, 1, 1), alpha.view(N, 1)
        points = [pack(wide * image + (1 - wide) * fake_image, narrow * text + (1 - narrow) * fake_text, label)]
    elif kind == "dragan":
        in_order = sorted([image, text], key=lambda x: [id(t) for t in pack_values(real)].index(id(x)))
        noises = {id(x): torch.rand_like(x) for x in in_order}
        alpha = torch.rand(N, dtype=torch.float64)
        moved = [x + alpha.view(N, *[1] * (x.ndim - 1)) * 0.5 * x.std() * noises[id(x)] for x in (image, text)]
        points = [pack(*moved, label)]
    else:
        points = {"r1+r2": [real, fake], "r2": [fake]}[kind]
    norms = [joint(two_gradients(discriminator, point, form)) for point in points]
    two_sided = kind in ("wgan-gp", "dragan")
    expected = sum(2 * (n - 1).square().mean() if two_sided else n.square().mean() for n in norms)
    assert_close(actual, expected, order=1)


def pack_values(held):
    return list(held.values()) if isinstance(held, dict) else list(held)


def test_several_inputs_of_one_shape_have_norms_over_a_dimension():
    discriminator = nn.Sequential(nn.Conv2d(6, 4, 3), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(144, 1)).double()
    real = images(), images()
    pair = [x.clone().requires_grad_() for x in real]
    g = torch.autograd.grad(discriminator(torch.cat(pair, 1)).sum(), pair)
    actual = fastgan.gradient_penalty(lambda x: discriminator(torch.cat(x, 1)), real, kind="r1", dims=1)
    assert_close(actual, 5 * torch.cat(g, 1).square().sum(1).mean(), order=1)


def test_an_input_that_the_discriminator_does_not_use_adds_nothing():
    discriminator, x = affine(), images()
    alone = fastgan.gradient_penalty(discriminator, x, kind="r1")
    for call in (fastgan.gradient_penalty, lambda *a, **k: fastgan.logits_and_penalty(*a, **k)[1]):
        assert_close(call(lambda pair: discriminator(pair[0]), (x, images()), kind="r1"), alone, order=0)


def test_the_discriminator_gets_the_form_that_was_given():
    held = pairs("ordered dict")[0]
    seen = []

    def discriminator(inputs):
        seen.append(inputs)
        return inputs["image"].sum((1, 2, 3))

    fastgan.gradient_penalty(discriminator, held, kind="r1")
    assert type(seen[0]) is OrderedDict
    assert list(seen[0]) == list(held)
    assert seen[0]["label"] is held["label"]
    assert seen[0]["image"].requires_grad
    assert not held["image"].requires_grad


X, T = torch.randn(N, 3, 8, 8), torch.randn(N, 7)
BAD_INPUTS = {
    "no tensor": (dict(real=(X, 3)), TypeError, r"real\[1\] must be a tensor, got int"),
    "nested": (dict(real=[[X]]), TypeError, r"real\[0\] must be a tensor, got list"),
    "nothing that is floating": (
        dict(real={"label": torch.arange(N)}),
        TypeError,
        "real must hold a floating-point tensor",
    ),
    "nothing": (dict(real=()), TypeError, "real must hold a floating-point tensor"),
    "other rows": (dict(real=(X, T[:2])), ValueError, r"one row per sample, got shapes \(5, 3, 8, 8\), \(2, 7\)"),
    "empty": (dict(real=(X, T[:, :0])), ValueError, r"real\[1\] must be .* not empty, got shape \(5, 0\)"),
    "a set": (dict(real={1}), TypeError, "real must be a tensor, or a tuple, list or dict of tensors, got set"),
    "fewer fakes": (
        dict(real=(X, T), fake=(X,)),
        ValueError,
        r"fake must hold the same tensors as real, real\[0\], real\[1\], ",
    ),
    "one fake": (dict(real=(X, T), fake=X), ValueError, "fake must hold the same tensors as real"),
    "other keys": (dict(real={"a": X}, fake={"b": X}), ValueError, r"real\['a'\], got fake\['b'\]"),
    "other shapes": (dict(real=(X, T), fake=(X, T[:, :2])), ValueError, r"fake\[1\] must have the shape of real\[1\]"),
    "other types": (
        dict(real=(X, T), fake=(X, T.long())),
        TypeError,
        r"fake\[1\] and real\[1\] must both be floating-point",
    ),
    "remaining dimensions": (dict(real=(X, T), kind="r1", dims=1), ValueError, "the same remaining dimensions"),
}


@pytest.mark.parametrize(("change", "error", "message"), BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_bad_inputs_are_named(change, error, message):
    def discriminator(inputs):
        return sum(x.flatten(1).sum(1) for x in inputs)

    with pytest.raises(error, match=message):
        fastgan.gradient_penalty(discriminator, **{"kind": "wgan-gp", **change})


def test_each_of_several_inputs_must_require_a_gradient():
    x, t = X.clone().requires_grad_(), T.clone()
    with pytest.raises(ValueError, match=r"inputs\['t'\] must require a gradient .*: inputs\['t'\].requires_grad_\(\)"):
        fastgan.penalty_from_logits(x.sum((1, 2, 3)) + t.sum(1), {"x": x, "t": t})


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
