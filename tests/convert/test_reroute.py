"""When a converted model's forward runs on fastgan's ops, and hand-written penalties of such models."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.parametrizations import spectral_norm

import fastgan
from fastgan.convert import reroute
from fastgan.ops.twice_differentiable import Rerouting
from tests.ops.test_gradient_penalty import CountConvolutions, convolutional, critic, gradients, images

OURS, PYTORCHS = {"_ConvolutionBackward"}, {"ConvolutionBackward0"}


@pytest.fixture
def at_any_size(monkeypatch):
    monkeypatch.setattr(reroute, "_LEAST", 1)


def nodes_of(result):
    def nodes(node):
        yield type(node).__name__
        for following, _ in node.next_functions:
            if following is not None:
                yield from nodes(following)

    return set(nodes(result.sum().grad_fn))


def convolutions_of(model, x):
    return nodes_of(model(x)) & (OURS | PYTORCHS)


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
    # One pass traces the calls of the model, not the functions to which they are rerouted.
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


class Critic(nn.Module):
    """A transformer without convolutions."""

    def __init__(self, convolution=False):
        super().__init__()
        self.embed = nn.Conv1d(3, 16, 1) if convolution else nn.Linear(3, 16)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True)
        self.head = nn.Linear(16, 1)

    def forward(self, tokens):  # (N, tokens, 3)
        h = self.embed(tokens.mT).mT if isinstance(self.embed, nn.Conv1d) else self.embed(tokens)
        return self.head(self.layer(h)).mean(1)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.head = nn.Linear(3, 24), nn.Linear(8, 1)

    def forward(self, tokens):  # (N, tokens, 3)
        query, key, value = self.qkv(tokens).unsqueeze(1).chunk(3, -1)
        return self.head(F.scaled_dot_product_attention(query, key, value)).mean((1, 2))


@pytest.mark.parametrize(
    "make",
    [Critic, lambda: Critic(convolution=True), Attention, lambda: nn.Sequential(Critic())],
    ids=["encoder layer", "with a convolution", "function", "sequential"],
)
def test_a_penalty_by_hand_goes_through_attention_of_a_converted_model(make):
    torch.manual_seed(0)
    plain = make().double()
    converted = copy.deepcopy(plain)
    assert "rerouted" in fastgan.convert(converted).rows[0].reason
    x = torch.randn(2, 9, 3, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="_backward is not implemented"):
        penalty_by_hand(plain, x).backward()
    with sdpa_kernel(SDPBackend.MATH):
        penalty = penalty_by_hand(plain, x)
        expected = [penalty, *gradients(plain, penalty)]
    for _ in range(2):  # the second forward is one of a form that is known
        penalty = penalty_by_hand(converted, x)
        for a, e in zip([penalty, *gradients(converted, penalty)], expected, strict=True):
            torch.testing.assert_close(a, e)
    fastgan.revert(converted)
    with pytest.raises(RuntimeError, match="_backward is not implemented"):
        penalty_by_hand(converted, x).backward()


def test_only_a_forward_that_a_penalty_may_follow_takes_another_attention():
    model = Attention()
    fastgan.convert(model)
    x = torch.randn(2, 9, 3)
    assert "_AttentionBackward" not in nodes_of(model(x))
    with torch.no_grad():
        assert model(x.clone().requires_grad_()).grad_fn is None
    assert "_AttentionBackward" in nodes_of(model(x.requires_grad_()))
    with fastgan.use_backend("reference"):
        assert "_AttentionBackward" not in nodes_of(model(x))


def test_a_model_without_attention_is_looked_through_once(monkeypatch):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))

        def forward(self, x):
            return self.layers(x)

    model = Own()
    fastgan.convert(model)
    entered = []
    monkeypatch.setattr(reroute, "Rerouting", lambda after: entered.append(after) or Rerouting(after))
    x = torch.randn(2, 3, requires_grad=True)
    for _ in range(3):
        model(x)
    assert entered == [None]
    model.eval()(x)
    model(torch.randn(5, 3, requires_grad=True))
    assert entered == [None] * 3


def test_a_model_of_linear_layers_alone_is_left_as_it_is():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    fastgan.convert(model)
    assert type(model) is nn.Sequential
