"""A loss on features that a discriminator, a hook or a closure has stored during the forward of a penalty."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.autograd.graph import GradientEdge
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import fastgan
from fastgan.ops import gradient_penalty
from fastgan.ops.gradient_penalty import forward, small
from fastgan.ops.gradient_penalty.overhead import Threshold
from fastgan.ops.gradient_penalty.small import Size


class Critic(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(16, 1)
        self.kept = []

    def keep(self, x, h, k, logits):
        return logits

    def forward(self, x):
        h = F.leaky_relu(self.first(x), 0.2)
        k = F.leaky_relu(self.second(h), 0.2)
        return self.keep(x, h, k, self.last(k.flatten(1)))


class Attribute(Critic):
    def keep(self, x, h, k, logits):
        self.kept = h, k
        return logits


class InAList(Critic):
    def keep(self, x, h, k, logits):
        self.kept += [h, h.detach()]
        return logits


class Branch(Critic):
    """A function of the features that the logits do not depend on."""

    def keep(self, x, h, k, logits):
        self.kept = [h.mean((2, 3)).sin()]
        return logits


class Logits(Critic):
    def keep(self, x, h, k, logits):
        self.kept = [logits]
        return logits


class InTheOutput(Critic):
    def keep(self, x, h, k, logits):
        self.kept = [logits, h]
        return self.kept


class OneInTheOutput(Critic):
    def keep(self, x, h, k, logits):
        self.kept = [logits]
        return self.kept


class Hook(Critic):
    def __init__(self):
        super().__init__()
        for layer in (self.first, self.second):
            layer.register_forward_hook(lambda module, inputs, output: self.kept.append(output))


class HookOfInputs(Critic):
    def __init__(self):
        super().__init__()
        self.last.register_forward_pre_hook(lambda module, inputs: self.kept.append(inputs))


def through_a_closure(critic):
    def call(x):
        h = F.relu(critic.first(x))
        critic.kept.append(h)
        return critic.last(F.max_pool2d(critic.second(h), 1).flatten(1))

    return call


def in_an_exception(critic):
    """The traceback refers to the frame of the forward, and thus to its variables."""

    def call(x):
        h = F.relu(critic.first(x))
        try:
            raise ValueError
        except ValueError as error:
            critic.kept = [h * 2]
            critic.error = error
        return critic.last(critic.second(h).flatten(1))

    return call


WAYS = {
    **{kind.__name__: (kind, lambda critic: critic) for kind in Critic.__subclasses__()},
    "a closure": (Critic, through_a_closure),
    "an exception": (Critic, in_an_exception),
}


def tensors(kept):
    return [kept] if isinstance(kept, torch.Tensor) else [t for part in kept for t in tensors(part)]


def features_loss(critic):
    return sum(part.square().mean() for part in tensors(critic.kept) if part.requires_grad)


def by_fastgan(critic, function, x):
    select = 0 if isinstance(critic, InTheOutput | OneInTheOutput) else None
    logits, penalty = fastgan.logits_and_penalty(function, x, select=select, weight=10)
    return (logits if select is None else logits[0]).sigmoid().sum() + penalty


def by_pytorch(critic, function, x, loss=True):
    x = x.detach().requires_grad_()
    logits = function(x)
    logits = logits if isinstance(logits, torch.Tensor) else logits[0]
    (grad,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
    return 5 * grad.square().sum((1, 2, 3)).mean() + (logits.sigmoid().sum() if loss else 0)


@pytest.fixture(params=Size)
def size(request, monkeypatch):
    """All of fastgan's functions, those after the first layer, and PyTorch's."""
    for module in (forward, gradient_penalty):
        monkeypatch.setattr(module, "size_of", lambda discriminator, inputs, call: request.param)
    monkeypatch.setattr(small, "threshold", lambda x: Threshold(per_layer=0, least=6000))


@pytest.mark.parametrize("way", WAYS)
def test_stored_features_can_be_differentiated_with_the_loss_or_after_it(way, size):
    kind, around = WAYS[way]
    critic, x = kind().double(), torch.randn(3, 3, 6, 6, dtype=torch.float64)
    expected = gradients(critic, by_pytorch(critic, around(critic), x) + features_loss(critic))
    critic.kept = []
    assert_close(gradients(critic, by_fastgan(critic, around(critic), x) + features_loss(critic)), expected)
    critic.kept = []
    first = gradients(critic, by_fastgan(critic, around(critic), x), retain_graph=True)
    after = gradients(critic, features_loss(critic))
    assert_close([a + b for a, b in zip(first, after, strict=True)], expected)


@pytest.mark.parametrize("way", WAYS)
def test_the_features_of_a_penalty_alone_can_be_differentiated(way, size):
    kind, around = WAYS[way]
    critic, x = kind().double(), torch.randn(3, 3, 6, 6, dtype=torch.float64)
    select = 0 if kind in (InTheOutput, OneInTheOutput) else None
    penalty = fastgan.gradient_penalty(around(critic), x, kind="r1", select=select)
    actual = gradients(critic, penalty + features_loss(critic))
    critic.kept = []
    penalty = by_pytorch(critic, around(critic), x, loss=False)
    assert_close(actual, gradients(critic, penalty + features_loss(critic)))


def nothing(critic, h):
    pass


def detached(critic, h):
    critic.kept = [h.detach()]


def weights(critic, h):
    critic.kept = [critic.first.weight * 2]


@pytest.mark.parametrize("store", [nothing, detached, weights])
@pytest.mark.parametrize("function", [fastgan.gradient_penalty, fastgan.logits_and_penalty])
def test_other_forwards_are_still_freed(function, store):
    critic, nodes = Critic(), []
    parametrizations.spectral_norm(critic.second)

    def call(x):
        h = F.leaky_relu(critic.first(x), 0.2)
        store(critic, h)
        nodes.append(h.grad_fn)
        return critic.last(F.leaky_relu(critic.second(h), 0.2).flatten(1))

    results = function(call, torch.randn(3, 3, 6, 6), kind="r1")
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad([GradientEdge(nodes[0], 0)], critic.first.weight, torch.ones(3, 4, 4, 4))
    del results


def test_a_loss_with_uneven_gradients_and_one_on_returned_features():
    critic, x = InTheOutput().double(), torch.randn(3, 3, 6, 6, dtype=torch.float64)
    critic.last = nn.Linear(16, 2).double()
    (logits, features), penalty = fastgan.logits_and_penalty(critic, x, select=0, weight=10)
    actual = gradients(critic, penalty + logits.square().sum() + features.square().mean())
    x.requires_grad_()
    logits, features = critic(x)
    (grad,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
    total = 5 * grad.square().sum((1, 2, 3)).mean() + logits.square().sum() + features.square().mean()
    assert_close(actual, gradients(critic, total))


def gradients(critic, total, **options):
    return torch.autograd.grad(total, list(critic.parameters()), materialize_grads=True, **options)


def assert_close(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
