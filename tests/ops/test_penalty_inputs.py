"""Penalties of several inputs, in a tuple, a list or a dict."""

from __future__ import annotations

import copy
from collections import OrderedDict, namedtuple

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastgan
from fastgan.nn import GradientPenalty
from tests.harness import assert_close
from tests.ops.penalty_problem import (
    CALLS,
    N,
    affine,
    gradients,
    images,
)

Pair = namedtuple("Pair", ["image", "text"])


class OfPair(nn.Module):
    """Return the image (N, 3, 8, 8), the text (N, 7) and the label (N,) from any container."""

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


@pytest.mark.parametrize("call", [c for name, c in CALLS.items() if name != "penalty_from_logits"])
def test_inputs_made_in_inference_mode_are_copied(call):
    x = images()
    with torch.inference_mode():
        made = x.clone()
    discriminator = affine()
    assert_close(call(discriminator, made, kind="r1"), call(discriminator, x, kind="r1"), order=0)


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
