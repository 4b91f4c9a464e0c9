"""Calls and modes in which a replacement was not compared run the original code."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

import fastgan
from tests.convert.stand_ins import IMAGES, BigConv, BigLinear, Discrimination, MinibatchStdLayer
from tests.harness import assert_close


class MinibatchStdOfAnyEps(nn.Module):
    def forward(self, x, eps=1e-8):
        y = (x.var(0, unbiased=False) + eps).sqrt().mean().expand(len(x), 1, *x.shape[2:])
        return torch.cat([x, y], 1)


class DiscriminationOfImages(Discrimination):
    def forward(self, x):
        return super().forward(x.flatten(1))


def test_a_call_that_was_not_compared_is_the_layers_own():
    layer, images = MinibatchStdOfAnyEps(), DiscriminationOfImages(192, 4, 3)
    for module, args, kwargs in (
        (layer, [IMAGES], {"eps": 0.1}),
        (layer, [IMAGES, 0.1], {}),
        (layer, [IMAGES.flatten(1)], {}),
        (images, [IMAGES], {}),
    ):
        converted = copy.deepcopy(module)
        assert fastgan.convert(converted).replaced
        assert torch.equal(converted(*args, **kwargs), module(*args, **kwargs))


class MinibatchStdOfAPrivateGroup(nn.Module):
    epsilon = 1e-8

    def __init__(self):
        super().__init__()
        self._group = 4

    def forward(self, x):
        group = min(self._group, len(x))
        while len(x) % group:
            group = self.less(group)
        y = x.reshape(group, -1, *x.shape[1:])
        y = (y.var(0, unbiased=False) + self.epsilon).sqrt().mean((1, 2, 3), keepdim=True)
        return torch.cat([x, y.repeat(group, 1, *x.shape[2:])], 1)

    def less(self, group):
        return group - 1


class MinibatchStdOfHalves(MinibatchStdOfAPrivateGroup):
    def less(self, group):
        return group // 2


class MinibatchStdOfOne(MinibatchStdOfAPrivateGroup):
    def less(self, group):
        return 1


@pytest.mark.parametrize("layer", [MinibatchStdOfHalves, MinibatchStdOfOne])
def test_another_rule_for_remainders_is_another_layer(layer):
    assert not fastgan.convert(layer()).replaced
    assert fastgan.convert(MinibatchStdOfAPrivateGroup()).replaced


def test_an_attribute_changed_afterwards_counts():
    stddev, conv = MinibatchStdLayer(4), BigConv(3, 5, 3)
    private, of_the_class = MinibatchStdOfAPrivateGroup(), MinibatchStdOfAPrivateGroup()
    for module, name, value in (
        (stddev, "group_size", 2),
        (conv, "iterations_", 5),
        (private, "_group", 2),
        (of_the_class, "epsilon", 0.1),
    ):
        converted = copy.deepcopy(module)
        assert fastgan.convert(converted).replaced
        setattr(module, name, value)
        setattr(converted, name, value)
        assert torch.equal(converted(IMAGES), module(IMAGES))


class MinibatchStdInTrainingAlone(MinibatchStdLayer):
    def forward(self, x):
        return super().forward(x) if self.training else F.pad(x, (0, 0, 0, 0, 0, 1))


class DiscriminationInTrainingAlone(Discrimination):
    def closeness(self, distances):
        return super().closeness(distances) * (1.0 if self.training else 0.5)


@pytest.mark.parametrize("layer", [MinibatchStdInTrainingAlone(4), DiscriminationInTrainingAlone(6, 4, 3)])
@pytest.mark.parametrize("training", [True, False])
def test_a_layer_that_evaluates_another_way_is_left_alone(layer, training):
    (row,) = fastgan.convert(layer.train(training)).rows
    assert row.replaced_by is None
    assert "another" in row.reason


class SquaredDiscrimination(Discrimination):
    def closeness(self, distances):
        return torch.exp(-distances.square()).sum(0) - 1


def test_what_a_layer_computes_is_not_judged_by_the_values_of_its_parameters():
    for kind, replaced_by in ((Discrimination, "minibatch_discrimination"), (SquaredDiscrimination, None)):
        for value in (0.0, 1e3, float("nan")):
            layer = kind(6, 4, 3)
            nn.init.constant_(layer.T, value)
            assert fastgan.convert(layer).rows[0].replaced_by == replaced_by


def test_frozen_layers_are_replaced_and_stay_frozen():
    for layer, x in ((BigConv(3, 5, 3), IMAGES), (Discrimination(6, 4, 3), torch.randn(8, 6))):
        layer.requires_grad_(False)
        original = copy.deepcopy(layer)
        assert fastgan.convert(layer).replaced
        assert not any(p.requires_grad for p in layer.parameters())
        assert_close(layer(x), original(x).double(), order=0)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_modules_that_cannot_be_tried_are_listed_with_the_reason():
    model = nn.Sequential(torch.jit.script(nn.Conv2d(3, 4, 3)), Discrimination(6, 4, 3).to("meta"))
    _, compiled, without_data = fastgan.convert(model).rows
    assert (compiled.replaced_by, compiled.reason) == (None, "compiled by TorchScript")
    assert without_data.replaced_by is None
    assert "could not be tried" in without_data.reason


class MinibatchStdInFront(nn.Module):
    def forward(self, x):
        return MinibatchStdLayer(4)(x).roll(1, 1)


def test_statistics_that_are_put_elsewhere_are_told():
    (row,) = fastgan.convert(MinibatchStdInFront()).rows
    assert (row.replaced_by, "it does not append its statistics to its input" in row.reason) == (None, True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_verify_takes_sums_that_cancel_for_rounding(dtype):
    # Batch norm takes the mean away, and with it the gradient of the bias before it.
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), BigLinear(288, 1)).to(dtype)
    verification = fastgan.convert(model).verify(IMAGES.to(dtype))
    assert verification.equal, str(verification)


def test_verify_sees_a_small_error_beside_sums_that_cancel(monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(BigConv(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), BigLinear(288, 1))
    report = fastgan.convert(model)
    right = fastgan.ops.spectral_norm
    wrong = lambda *a, **k: [1.001 * w if len(w) == 1 else w for w in right(*a, **k)]  # noqa: E731
    monkeypatch.setattr(fastgan.ops, "spectral_norm", wrong)
    verification = report.verify(IMAGES)
    errors = {d.kind: d.error / d.allowed for d in verification.differences}
    assert min(errors["output"], errors["gradient"]) > 5, str(verification)


def test_a_layer_that_is_called_twice_in_a_forward_is_equal_too():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.last = spectral_norm(nn.Conv2d(3, 3, 3, padding=1)), nn.Linear(192, 1)

        def forward(self, x):
            return self.last(self.conv(F.relu(self.conv(x))).flatten(1))

    torch.manual_seed(0)
    report = fastgan.convert(Twice())
    assert report.replaced
    assert report.verify(IMAGES).equal


def test_verify_compares_values_and_gradients_where_no_penalty_reaches_the_input():
    class Detached(BigConv):
        def forward(self, x):
            return super().forward(x.detach())

    differences = fastgan.convert(Detached(3, 5, 3)).verify(IMAGES).differences
    assert {d.kind: d.error <= d.allowed for d in differences} == dict.fromkeys(
        ("output", "gradient", "penalty", "state"), True
    )
