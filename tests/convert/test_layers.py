"""Single layers are replaced if they compute the same as fastgan's, and are left alone otherwise."""

from __future__ import annotations

import copy
import pickle
import sys
import types

import pytest
import torch
from torch import nn

import fastgan
from fastgan import nn as fnn
from tests.convert.stand_ins import (
    IMAGES,
    BarNorm,
    BigConv,
    ContiguousMinibatchStd,
    Discrimination,
    MinibatchStdLayer,
    StridedStd,
)
from tests.harness import assert_close


class UnbiasedMinibatchStd(StridedStd):
    def variance(self, y):
        return y.var(0)


class MinibatchStdOfAnotherEps(StridedStd):
    def variance(self, y):
        return super().variance(y).clamp(min=1e-8) - 1e-8


class WholeBatchMinibatchStd(StridedStd):
    """If groups do not divide the batch, the whole batch is one group."""

    def forward(self, x):
        self.group_size, kept = len(x) if len(x) % min(self.group_size, len(x)) else self.group_size, self.group_size
        try:
            return super().forward(x)
        finally:
            self.group_size = kept


class SquaredDiscrimination(Discrimination):
    def closeness(self, distances):
        return torch.exp(-distances.square()).sum(0) - 1


@pytest.mark.parametrize("iterations", [1, 3])
@pytest.mark.parametrize("kind", [BigConv, BarNorm])
def test_the_number_of_iterations_is_found(kind, iterations):
    module = (
        BigConv(3, 5, 3, num_itrs=iterations) if kind is BigConv else BarNorm(nn.Conv2d(3, 5, 3), "weight", iterations)
    )
    converted = copy.deepcopy(module)
    (row,) = fastgan.convert(converted, mend=True).replaced
    assert row.replaced_by == "fused spectral norm"
    assert_close(converted(IMAGES), module(IMAGES).double(), order=0)


class DataNorm(BigConv):
    """A method that replaces the storage of the u that an earlier graph has saved."""

    def normalized(self):
        matrix = self.weight.flatten(1)
        with torch.no_grad():
            v = nn.functional.normalize(self.u0 @ matrix, eps=self.eps)
            u = nn.functional.normalize(v @ matrix.t(), eps=self.eps)
        kept = self.u0 if self.training else u
        if self.training:
            self.u0.data = u
        sigma = (v @ matrix.t() * kept).sum()
        if self.training:
            self.sv0.copy_(sigma.detach())
        return self.weight / sigma


def test_gradients_that_differ_only_after_two_forwards_are_mended_on_request_alone():
    for mend in (False, True):
        module = DataNorm(3, 5, 3)
        (row,) = fastgan.convert(module, mend=mend).rows
        assert row.replaced_by == ("fused spectral norm" if mend else None)
        assert ("corrects its gradients" if mend else "gradients are wrong after two forwards") in row.reason


class Failing(nn.Conv2d):
    def forward(self, x):
        raise ValueError("no such input")


class FailingNorm(BarNorm):
    """Its first forward fails before there is a weight."""

    def forward(self, x):
        raise ValueError("no such input")


@pytest.mark.parametrize("module", [lambda: BarNorm(Failing(3, 5, 3)), lambda: FailingNorm(nn.Conv2d(3, 5, 3))])
def test_a_mended_wrapper_passes_the_error_of_its_first_forward_on(module):
    module = module()
    assert fastgan.convert(module, mend=True).replaced
    with pytest.raises(ValueError, match="no such input"):
        module(IMAGES)


class StoresInEvaluation(BigConv):
    def normalized(self):
        training, self.training = self.training, True
        try:
            return super().normalized()
        finally:
            self.training = training


class Clamped(BigConv):
    def normalized(self):
        return super().normalized() * 0.99


def test_what_differs_in_a_style_is_left_alone_with_the_difference():
    for kind in (StoresInEvaluation, Clamped):
        module = kind(3, 5, 3)
        (row,) = fastgan.convert(module).rows
        assert row.replaced_by is None
        assert "its W_ differs from fastgan's spectral norm by" in row.reason
        assert type(module) is kind
    several = BigConv(3, 5, 3)
    several.register_buffer("u1", torch.randn(1, 5))
    assert fastgan.convert(several).rows[0].reason == "estimates several singular values"


@pytest.mark.parametrize(("group_size", "channels"), [(4, 1), (2, 2), (3, 1), (None, 1)])
def test_minibatch_stddev_is_found_by_name_and_settings(group_size, channels):
    layer = MinibatchStdLayer(group_size, channels)
    original = copy.deepcopy(layer)
    (row,) = fastgan.convert(layer).rows
    assert row.replaced_by == "minibatch_stddev"
    assert f"group_size={group_size}, num_channels={channels}, eps=1e-08" in row.reason
    x = torch.randn(12, 4, 5, 5)
    assert_close(layer(x), original(x).double(), order=0)


@pytest.mark.parametrize(
    "kind", [ContiguousMinibatchStd, UnbiasedMinibatchStd, MinibatchStdOfAnotherEps, WholeBatchMinibatchStd]
)
def test_another_minibatch_statistic_is_left_alone(kind):
    layer = kind(4)
    (row,) = fastgan.convert(layer).rows
    assert row.replaced_by is None
    assert "another statistic" in row.reason
    assert type(layer) is kind


class MinibatchStdWithNaN(StridedStd):
    def forward(self, x):
        return super().forward(x) * (float("nan") if len(x) == 1 else 1.0)


def test_what_is_not_finite_is_equal_to_nothing():
    assert fastgan.convert(MinibatchStdWithNaN(4)).rows[0].replaced_by is None


def test_a_name_alone_replaces_nothing():
    class MinibatchStdOfNothing(nn.Module):
        def forward(self, x):
            raise NotImplementedError("no image")

    (row,) = fastgan.convert(MinibatchStdOfNothing()).rows
    assert (row.replaced_by, row.reason) == (None, "could not be tried: NotImplementedError: no image")


def test_a_class_that_carries_its_own_source_code_through_pickles_is_replaced():
    # As in StyleGAN's pickles: the class is created from its source, in a module that cannot be imported.
    source = "class MinibatchStdLayer(Base):\n    def __reduce__(self):\n        return remake, (vars(self),)\n"
    made = types.ModuleType("_made_from_a_pickle")
    made.Base, made.remake = StridedStd, remake
    exec(source, made.__dict__)
    SOURCES.append(made.MinibatchStdLayer)
    layer = made.MinibatchStdLayer(4)
    assert "_made_from_a_pickle" not in sys.modules
    assert fastgan.convert(layer).rows[0].replaced_by == "minibatch_stddev"
    x = torch.randn(8, 3, 4, 4)
    for other in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert isinstance(other, made.MinibatchStdLayer)
        assert torch.equal(other(x), fnn.MinibatchStdDev(4)(x))
        assert type(fastgan.revert(other)) is made.MinibatchStdLayer


SOURCES: list[type] = []


def remake(state):
    module = SOURCES[-1].__new__(SOURCES[-1])
    module.__dict__.update(state)
    return module


@pytest.mark.parametrize("mean", [False, True])
def test_minibatch_discrimination_is_found_by_its_parameter(mean):
    layer = Discrimination(6, 4, 3, mean)
    original = copy.deepcopy(layer)
    (row,) = fastgan.convert(layer).rows
    assert row.replaced_by == "minibatch_discrimination"
    x = torch.randn(9, 6)
    assert_close(layer(x), original(x).double(), order=0)
    other = SquaredDiscrimination(6, 4, 3)
    (row,) = fastgan.convert(other).rows
    assert "another function of T" in row.reason
    assert type(other) is SquaredDiscrimination
