"""torch.compile of whole steps: one graph each, and the numbers of the eager step."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fastgan
from fastgan import nn as fnn
from fastgan.nn.utils import fuse_spectral_norm
from tests.harness import needs_dynamo
from tests.integrations.players import (
    LATENT,
    SHAPE,
    Generator,
    discriminator_loss,
    generator_loss,
    make_discriminator,
)

BATCH = 4
pytestmark = pytest.mark.filterwarnings("error:Dynamo")  # warnings about code that Dynamo cannot trace or skips


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """Use kernels for small inputs too, and no graph of another test."""
    monkeypatch.undo()  # poisoned memory cannot be traced
    torch.compiler.reset()
    with fastgan.use_backend("cpu"):
        yield


def descend(loss, players, inputs):
    value = loss(*players, *inputs)
    value.backward()
    with torch.no_grad():
        for parameter in (p for player in players for p in player.parameters()):
            parameter -= 0.1 * parameter.grad
            parameter.grad = None
    return value.detach()


def assert_trains_alike(loss, compiled_loss, players, twins, inputs):
    """Take two steps. The second uses the weights, u, v and running statistics of the first."""
    for _ in range(2):
        torch.testing.assert_close(descend(compiled_loss, players, inputs), descend(loss, twins, inputs))
    for net, twin in zip(players, twins, strict=True):
        for actual, expected in zip(net.state_dict().values(), twin.state_dict().values(), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


@needs_dynamo
def test_a_discriminator_step_is_one_graph():
    discriminator = make_discriminator()
    twin = copy.deepcopy(discriminator)
    images = torch.randn(2, BATCH, *SHAPE)
    compiled = torch.compile(discriminator_loss, backend="aot_eager", fullgraph=True)
    assert_trains_alike(discriminator_loss, compiled, [discriminator], [twin], images)


@needs_dynamo
def test_a_generator_step_is_one_graph():
    players = [Generator(), make_discriminator(minibatch=False)]
    twins = copy.deepcopy(players)
    compiled = torch.compile(generator_loss, backend="aot_eager", fullgraph=True)
    assert_trains_alike(generator_loss, compiled, players, twins, [torch.randn(BATCH, LATENT)])


FORMS = {
    "one weight at a time": lambda: fnn.utils.spectral_norm(nn.Linear(6, 4)),
    "the hook": lambda: fuse_spectral_norm(nn.Sequential(nn.utils.spectral_norm(nn.Linear(6, 4)))),
    "converted from u0, sv0": lambda: converted(),
}


def converted():
    from tests.convert.stand_ins import BigLinear

    model = nn.Sequential(BigLinear(6, 4))
    assert fastgan.convert(model).replaced
    return model


@needs_dynamo
@pytest.mark.parametrize("form", FORMS)
def test_other_forms_of_spectral_norm_are_one_graph(form):
    model = FORMS[form]()
    twin, x = copy.deepcopy(model), torch.randn(3, 6)
    compiled = torch.compile(lambda net, x: net(x).square().sum(), backend="eager", fullgraph=True)
    assert_trains_alike(lambda net, x: net(x).square().sum(), compiled, [model], [twin], [x])


def test_a_graph_keeps_the_backend_that_it_was_traced_with():
    x = torch.randn(4, 3, 5)
    norm = torch.compile(lambda x: fastgan.ops.group_norm(x, 3), backend="eager", fullgraph=True)
    with fastgan.use_backend("reference"):
        traced = norm(x)
    assert torch.equal(norm(x), traced)
    assert torch.equal(traced, fastgan.ops.group_norm(x, 3, backend="reference"))
