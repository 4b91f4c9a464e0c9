"""Code of users inside torch.compile: one graph, and the gradients and buffers of eager float64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import fastgan
from fastgan import gradient_penalty, logits_and_penalty
from fastgan.nn.utils import fuse_spectral_norm
from tests.integrations.compiled_problem import assert_same, gradients

pytestmark = [
    pytest.mark.skipif(
        tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11), reason="before 2.11 a penalty breaks the graph"
    ),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.undo()  # poisoned memory cannot be traced
    torch.compiler.reset()


class Critic(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, 2, 1)
        self.last = nn.Linear(16, 1)

    def features(self, x):
        return F.leaky_relu(self.first(x), 0.2)  # (N, 4, 4, 4)

    def forward(self, x):
        return self.last(F.leaky_relu(self.second(self.features(x)), 0.2).flatten(1))


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = Critic(), Critic()


class Ensemble:
    def __init__(self, model):
        self.members = {"one": model.one, "two": model.two}

    def score(self, x):
        return sum(member(x) for member in self.members.values())


class Counts(Critic):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.tensor(0))
        self.register_buffer("average", torch.zeros(4))

    def features(self, x):
        h = super().features(x)
        self.calls += 1
        self.average = 0.9 * self.average + 0.1 * h.detach().mean((0, 2, 3))
        return h - self.average.view(-1, 1, 1)


class Noisy(Critic):
    def features(self, x):
        return super().features(x + 0.1 * torch.randn(x.shape).to(x.dtype))


class Checkpointed(Critic):
    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=False)


class HalfDouble(Critic):
    def __init__(self):
        super().__init__()
        self.second.double()

    def features(self, x):
        return super().features(x).double()

    def forward(self, x):
        h = F.leaky_relu(self.second(self.features(x)), 0.2)
        return self.last(h.flatten(1).to(self.last.weight.dtype))


class Named(Critic):
    def forward(self, x):
        return {"logits": super().forward(x), "map": self.features(x).mean(1), "name": "critic"}


class Labeled(Critic):
    def __init__(self):
        super().__init__()
        self.classes = nn.Embedding(3, 16)

    def forward(self, x, y):
        h = F.leaky_relu(self.second(self.features(x)), 0.2).flatten(1)
        return self.last(h) + (self.classes(y) * h).sum(1, keepdim=True)


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, 4)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
        self.last = nn.Linear(8, 1)

    def forward(self, x):
        return self.last(self.layer(self.patches(x).flatten(2).mT).mean(1))


def spectral():
    model = Critic()
    for layer in (model.first, model.second, model.last):
        parametrizations.spectral_norm(layer)
    return fuse_spectral_norm(model)


LABELS = torch.tensor([0, 2, 1, 1])


def both(model, x):
    return gradient_penalty(model, x, kind="r1") + logits_and_penalty(model, x)[1]


def of_an_object(model, x):
    return gradient_penalty(Ensemble(model).score, x, kind="r1")


def of_two(model, x):
    first, penalty = logits_and_penalty(model.one, x)
    second, other = logits_and_penalty(model.two, x.flip(0))
    return first.mean() + penalty + second.square().mean() + 2 * other


def with_an_accuracy(model, x):
    with torch.no_grad():
        accuracy = (model(x) > 0).to(x.dtype).mean()
    logits, penalty = logits_and_penalty(model, x)
    return penalty + logits.mean() * (1 + accuracy)


def before_a_call(model, x):
    return gradient_penalty(model, x, kind="r1") + model(x.flip(0)).mean()


def selected(model, x):
    out, penalty = logits_and_penalty(model, x, select=lambda out: out["logits"])
    return penalty + out["map"].square().mean()


def with_labels(model, x):
    pair = {"a": x, "b": 2 * x}
    return logits_and_penalty(lambda pair: model(pair["a"] + pair["b"], y=LABELS), pair)[1]


def channels_last(model, x):
    return both(model, x.contiguous(memory_format=torch.channels_last))


def inside_another(model, x):
    @fastgan.compilable
    def slopes(critic, x):
        x.requires_grad_()
        return torch.autograd.grad(critic(x).sum(), x, create_graph=True)[0]

    @fastgan.compilable
    def penalty(x):
        return sum(slopes(critic, x).square().sum() for critic in (model.one, model.two))

    return penalty(x)


@fastgan.compilable
def curvature(model, x):
    x = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(model(x).sigmoid().sum(), x, create_graph=True)
    (along,) = torch.autograd.grad((grad * x.detach().flip(0)).sum(), x, create_graph=True)
    return 1e3 * along.square().mean()


@fastgan.compilable
def with_fastgans_penalty(model, x):
    x = x.detach().requires_grad_()
    logits = model(x)
    return fastgan.penalty_from_logits(logits, x, kind="r1") + logits.mean()


@fastgan.compilable
def of_a_learned_step(model, x):
    weights = dict(model.named_parameters())
    grads = torch.autograd.grad(model(x).square().mean(), tuple(weights.values()), create_graph=True)
    stepped = {name: weight - 0.1 * grad for (name, weight), grad in zip(weights.items(), grads, strict=True)}
    return torch.func.functional_call(model, stepped, (x,)).square().mean()


CASES = [
    (Two, of_an_object),
    (Two, of_two),
    (Counts, both),
    (Noisy, both),
    (Checkpointed, both),
    (HalfDouble, both),
    (Critic, with_an_accuracy),
    (spectral, before_a_call),
    (Named, selected),
    (Labeled, with_labels),
    (Critic, channels_last),
    (Transformer, both),
    (Two, inside_another),
    (Critic, curvature),
    (Critic, with_fastgans_penalty),
    (Critic, of_a_learned_step),
]


@pytest.mark.parametrize(("make", "step"), CASES)
def test_a_step_is_one_graph_and_equals_eager_float64(make, step):
    model = make()
    twin, x = copy.deepcopy(model).double(), torch.randn(4, 3, 8, 8)
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        torch.manual_seed(3)
        expected = gradients(twin, step(twin, x.double()))
        torch.manual_seed(3)
        assert_same(gradients(model, compiled(model, x)), expected, 1e-4)
        with torch.no_grad():
            for net in (model, twin):
                for name, parameter in net.named_parameters():
                    if expected[name] is not None:
                        parameter -= 0.01 * expected[name].to(parameter.dtype)
    for actual, wanted in zip(model.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(actual.to(wanted.dtype), wanted, rtol=1e-4, atol=1e-5)
