"""The forward of a converted model on fastgan's ops: when, and what becomes of a penalty written by hand."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

import fastgan
from fastgan.convert import reroute
from tests.ops.test_gradient_penalty import CountConvolutions, convolutional, critic, gradients, images

OURS, PYTORCHS = {"_ConvolutionBackward"}, {"ConvolutionBackward0"}


@pytest.fixture
def at_any_size(monkeypatch):
    monkeypatch.setattr(reroute, "_LEAST", 1)


def convolutions_of(model, x):
    def nodes(node):
        yield type(node).__name__
        for following, _ in node.next_functions:
            if following is not None:
                yield from nodes(following)

    return set(nodes(model(x).sum().grad_fn)) & (OURS | PYTORCHS)


def penalty_by_hand(discriminator, x):
    x = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(discriminator(x).sum(), x, create_graph=True)
    return (grad.flatten(1).norm(dim=1) - 1).square().mean()


def test_a_penalty_by_hand_takes_four_forwards_and_is_the_same(at_any_size):
    plain = critic().double()
    converted = copy.deepcopy(plain)
    fastgan.convert(converted)
    x = images()[0].double()
    counts, results = [], []
    for discriminator in (plain, converted):
        with CountConvolutions() as counter:
            penalty = penalty_by_hand(discriminator, x)
            results.append([penalty, *gradients(discriminator, penalty)])
        counts.append(counter.count)
    assert counts == [6 * 4, 4 * 4]
    for a, e in zip(*results, strict=True):
        torch.testing.assert_close(a, e)


def test_large_batches_alone_are_rerouted(monkeypatch):
    model = nn.Sequential(nn.Conv2d(3, 2**10, 3), nn.ReLU())
    fastgan.convert(model)
    assert convolutions_of(model, torch.randn(1, 3, 8, 8)) == PYTORCHS
    monkeypatch.setattr(reroute, "_LEAST", 2**10 * 28 * 64 - 1)  # a weight or bias at each position
    assert convolutions_of(model, torch.randn(1, 3, 8, 8)) == PYTORCHS, "as before, without counting again"
    fastgan.convert(fastgan.revert(model))
    assert convolutions_of(model, torch.randn(1, 3, 8, 8)) == OURS
    assert convolutions_of(model, torch.randn(1, 3, 7, 8)) == PYTORCHS


def test_what_somebody_else_decides_is_left_to_them(at_any_size):
    model = convolutional()
    fastgan.convert(model)
    x = images()[0]
    assert convolutions_of(model, x) == OURS
    with fastgan.use_backend("reference"):
        assert convolutions_of(model, x) == PYTORCHS
    assert torch.compile(model, backend="eager", fullgraph=True)(x).isfinite().all()
    assert torch.func.grad(lambda x: model(x).sum())(x).shape == x.shape
    with torch.no_grad():
        assert model(x).grad_fn is None
    # One pass follows what the model calls, not what these calls are rerouted to.
    assert fastgan.explain_penalty(model, x) == "one pass"


def test_copies_and_pickles_are_rerouted_and_a_reversion_is_not(at_any_size):
    model = nn.Sequential(spectral_norm(nn.Conv2d(3, 4, 3)), nn.Flatten(), nn.Linear(144, 1))
    keys, x = list(model.state_dict()), images()[0]
    fastgan.convert(model)
    assert list(model.state_dict()) == keys
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert convolutions_of(other, x) == OURS
        assert type(fastgan.revert(other)) is nn.Sequential
        assert convolutions_of(other, x) == PYTORCHS
    assert fastgan.convert(model).rows[0].reason == "already converted"


def test_a_step_of_a_converted_model_is_the_models(at_any_size):
    layers = nn.BatchNorm2d(8), nn.SiLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(72, 1)
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), *layers)
    converted = copy.deepcopy(plain)
    report = fastgan.convert(converted)
    assert "rerouted" in report.rows[0].reason
    x = images()[0]
    actual, expected = (gradients(model, F.softplus(-model(x)).mean()) for model in (converted, plain))
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-6)
    for a, e in zip(converted.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, e)
    assert report.verify(x).equal
