"""A whole step as a CUDA graph trains as without one. Steps that cannot be captured run eagerly, with a reason."""

from __future__ import annotations

import copy
import random
import re
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastgan
from fastgan.nn import GradientPenalty
from tests.integrations.players import SHAPE, make_discriminator

CUDA = pytest.mark.gpu
STEPS = 7


class Training:
    """A discriminator, its optimizer, and a step of both."""

    def __init__(self, discriminator, optimizer=None, extra=lambda discriminator, real: 0.0):
        self.discriminator, self.extra = discriminator, extra
        make = optimizer or (lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9))
        self.optimizer = make(discriminator.parameters())
        self.runs = 0

    def step(self, real, fake):
        self.runs += 1
        self.optimizer.zero_grad()
        penalty = fastgan.gradient_penalty(self.discriminator, real, fake, weight=1.0)
        loss = F.softplus(-self.discriminator(real)).mean() + F.softplus(self.discriminator(fake)).mean() + penalty
        loss = loss + self.extra(self.discriminator, real)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def graphed(self, batches, **options):
        return fastgan.graphed_step(
            self.step, batches, modules=[self.discriminator], optimizers=[self.optimizer], **options
        )

    def state(self):
        return [p.detach().cpu().clone() for p in self.discriminator.state_dict().values()]


def batches(count, device="cuda", size=4):
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(2, size, *SHAPE, generator=generator).to(device).unbind() for _ in range(count)]


def pair(**options):
    discriminator = make_discriminator(False).cuda()
    return Training(discriminator, **options), Training(copy.deepcopy(discriminator), **options)


def assert_same(one, other):
    for a, b in zip(one.state(), other.state(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def adam(parameters):
    return torch.optim.Adam(parameters, lr=0.01, capturable=True)


@CUDA
@pytest.mark.parametrize("optimizer", [None, adam], ids=["SGD", "Adam"])
def test_a_graphed_training_equals_the_eager_one(optimizer):
    graphed, eager = pair(optimizer=optimizer)
    data = batches(STEPS)
    step = graphed.graphed(data[0])
    torch.manual_seed(3)
    losses = [step(*batch) for batch in data]
    assert step.reason is None
    assert graphed.runs == 4, "three calls as given, and the capture"
    torch.manual_seed(3)
    expected = [eager.step(*batch) for batch in data]
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-6)  # outputs are copies, so each keeps its value
    assert_same(graphed, eager)


@CUDA
def test_a_smaller_last_batch_runs_as_it_was_given():
    graphed, eager = pair()
    data = [*batches(5), *batches(1, size=3), *batches(2)]
    step = graphed.graphed(data[0])
    for training, run in ((graphed, step), (eager, eager.step)):
        torch.manual_seed(3)
        for batch in data:
            run(*batch)
        assert training.optimizer.param_groups[0]["lr"] == 0.05
    assert_same(graphed, eager)
    assert step.reason is None


@CUDA
def test_a_number_that_changes_is_captured_again_until_it_is_too_often():
    graphed, eager = pair()
    data = batches(12)
    step = graphed.graphed(data[0], warmup=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for training, run in ((graphed, step), (eager, eager.step)):
            torch.manual_seed(3)
            for i, batch in enumerate(data):
                training.optimizer.param_groups[0]["lr"] = 0.05 / (1 + i // 2)
                run(*batch)
    assert_same(graphed, eager)
    assert "make the learning rate a tensor" in step.reason
    assert any("make the learning rate a tensor" in str(w.message) for w in caught)


@CUDA
def test_a_mode_that_changes_is_captured_again():
    graphed, eager = pair()
    data = batches(8)
    step = graphed.graphed(data[0])
    for training, run in ((graphed, step), (eager, eager.step)):
        torch.manual_seed(3)
        for i, batch in enumerate(data):
            training.discriminator.train(i < 6)
            run(*batch)
    assert step.reason is None
    assert_same(graphed, eager)


def draws_on_the_host(discriminator, real):
    return real.sum() * 0 + random.random()


def reads_a_value(discriminator, real):
    return real.sum() * 0 + real.mean().item()


LAZY = GradientPenalty("r1", every=2)


@CUDA
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"optimizer": lambda p: torch.optim.Adam(p, capturable=False)}, "construct it with capturable=True"),
        ({"extra": draws_on_the_host}, "draws random numbers on the host"),
        ({"extra": reads_a_value}, "its capture failed"),
        ({"extra": LAZY}, "GradientPenalty\\(every=2\\) counts calls on the host"),
    ],
    ids=["capturable", "host random", "item", "lazy"],
)
def test_what_a_replay_would_get_wrong_runs_without_a_graph_and_says_why(options, reason):
    graphed, eager = pair(**options)

    def train(training, step):
        LAZY.set_extra_state({"calls": 0})
        random.seed(2)
        torch.manual_seed(3)
        for batch in batches(6):
            step(*batch)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step = graphed.graphed(batches(1)[0])
        train(graphed, step)
    assert re.search(reason, step.reason)
    assert any(re.search(reason, str(w.message)) for w in caught)
    train(eager, eager.step)
    assert_same(graphed, eager)


@CUDA
def test_a_gradscaler_steps_after_the_graph_also_after_a_smaller_batch():
    trainings = pair()
    data = [*batches(5), *batches(1, size=3), *batches(2)]
    for training in trainings:
        scaler = torch.amp.GradScaler("cuda", init_scale=64.0)

        def backward(real, fake, training=training, scaler=scaler):
            training.optimizer.zero_grad()
            logits, penalty = fastgan.logits_and_penalty(training.discriminator, real)
            loss = F.softplus(-logits).mean() + F.softplus(training.discriminator(fake)).mean() + penalty
            scaler.scale(loss).backward()

        graphed = fastgan.graphed_step(backward, data[0], modules=[training.discriminator], optimizers=[])
        for batch in data:
            (graphed if training is trainings[0] else backward)(*batch)
            scaler.step(training.optimizer)
            scaler.update()
        assert graphed.reason is None
    assert_same(*trainings)


def on_cpu():
    return Training(nn.Sequential(nn.Flatten(), nn.Linear(int(torch.Size(SHAPE).numel()), 1)))


def test_on_a_cpu_the_step_runs_as_it_is():
    training = on_cpu()
    (real, fake), *_ = batches(1, "cpu")
    step = training.graphed((real, fake))
    assert step.reason == "its inputs are on the device cpu"
    for _ in range(5):
        assert step(real, fake).isfinite()
    assert training.runs == 5
    with pytest.raises(TypeError, match="graphed with 2 inputs, got 1"):
        step(real)
    with pytest.raises(TypeError, match="must be tensors, got int"):
        step(real, 3)


@pytest.mark.parametrize(
    ("examples", "options", "error", "message"),
    [
        ((3,), {}, TypeError, "must be tensors, got int"),
        (torch.zeros(3), {}, TypeError, r"got one tensor: pass \(x,\)"),
        ((torch.zeros(1),), {"step": None}, TypeError, "step must be callable, got NoneType"),
        ((torch.zeros(1),), {"modules": nn.ModuleDict({"d": nn.ReLU()})}, TypeError, "nn.Module, got str"),
        ((torch.zeros(1),), {"optimizers": [nn.ReLU()]}, TypeError, "must have param_groups, got ReLU"),
        ((), {}, ValueError, "at least one tensor"),
        ((torch.zeros(1), torch.zeros(1, device="meta")), {}, ValueError, "on one device, got cpu, meta"),
        ((torch.zeros(1),), {"warmup": 0}, ValueError, "warmup must be at least 1, got 0"),
    ],
)
def test_bad_input_is_refused(examples, options, error, message):
    with pytest.raises(error, match=message):
        fastgan.graphed_step(
            **{"step": lambda *inputs: None, "example_inputs": examples, "modules": [], "optimizers": [], **options}
        )
