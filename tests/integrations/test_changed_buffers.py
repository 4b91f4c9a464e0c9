"""Buffers that a compiled step changes: its backward uses the values that the forward had, as in eager mode.

Values are computed again in the backward by the partitioner of Inductor. The backend here has it, without the kernels.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import EagerAndRecordGraphs
from torch.nn import functional as F

import fastgan
from tests.harness import VERSION

pytestmark = [
    pytest.mark.skipif(VERSION < (2, 11), reason="before 2.11 a penalty breaks the graph"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]
PARTITIONED = "aot_eager_decomp_partition"
NORMS = {
    "parametrization": nn.utils.parametrizations.spectral_norm,
    "hook": nn.utils.spectral_norm,
    "fastgan's": fastgan.nn.utils.spectral_norm,
}


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.undo()  # poisoned memory cannot be traced
    torch.compiler.reset()


class Scaled(nn.Module):
    """Scales features by two values of a buffer that it then renews."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 3), nn.Linear(3, 1)
        self.register_buffer("scale", torch.rand(3) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        renewed = 0.9 * self.scale + 0.05
        features = F.leaky_relu(self.first(x) * renewed, 0.2) * self.scale.square()
        self.scale.copy_(renewed)
        return self.last(features)


def critic(kind: str) -> nn.Module:
    """Return a critic whose layers have few inputs or outputs. Only then are u and v cheap to compute again."""
    norm = NORMS[kind.removeprefix("converted ")]
    layers = norm(nn.Linear(3, 16)), nn.LeakyReLU(0.2), norm(nn.Linear(16, 3)), nn.ReLU(), norm(nn.Linear(3, 1))
    model = nn.Sequential(*layers).double()
    for vector in model.buffers():
        vector.copy_(F.normalize(torch.randn_like(vector), dim=0))  # far from convergence
    if kind.startswith("converted"):
        fastgan.convert(model)
    return model


def penalty(D: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
    return fastgan.gradient_penalty(D, real, kind="r1")


def penalty_first(D: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
    logits, penalty = fastgan.logits_and_penalty(D, real, kind="r1")
    return penalty + F.softplus(-logits).mean() + F.softplus(D(fake)).mean()


def penalty_last(D: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
    losses = F.softplus(-D(real)).mean() + F.softplus(D(fake)).mean()
    return losses + fastgan.gradient_penalty(D, (real + fake) / 2, kind="r1")


def both_penalties(D: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
    (on_real, r1), (on_fake, r2) = (fastgan.logits_and_penalty(D, x, kind="r1") for x in (real, fake))
    return F.softplus(on_fake - on_real).mean() + r1 + r2


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(8, 3).double(), torch.randn(8, 3).double()


def assert_steps_agree(step: Any, compiled: Any, model: nn.Module) -> None:
    eager, theirs = model, copy.deepcopy(model)
    for _ in range(2):
        samples = batch()
        found = []
        for run, copied in ((step, eager), (compiled, theirs)):
            copied.zero_grad()
            run(copied, *samples).backward()
            found.append([p.grad for p in copied.parameters()] + list(copied.buffers()))
        torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-12)


STEPS = [("parametrization", step) for step in (penalty, penalty_first, penalty_last, both_penalties)]
STEPS += [(kind, penalty_last) for kind in ("hook", "fastgan's", "converted parametrization", "converted hook")]


@pytest.mark.parametrize(("kind", "step"), STEPS)
def test_spectral_norm_of_few_inputs_or_outputs(kind, step):
    model = critic(kind)
    assert_steps_agree(step, torch.compile(step, backend=PARTITIONED, fullgraph=True), model)


def test_a_buffer_that_a_forward_renews():
    assert_steps_agree(penalty, torch.compile(penalty, backend=PARTITIONED, fullgraph=True), Scaled().double())


def test_inductor_has_the_gradients_of_eager_mode():
    assert_steps_agree(penalty_first, torch.compile(penalty_first, fullgraph=True), critic("parametrization"))


def copies_in(step: Any, model: nn.Module, *samples: Tensor) -> int:
    recorded = EagerAndRecordGraphs()
    torch.compile(step, backend=recorded, fullgraph=True)(model, *samples)
    (graph,) = recorded.graphs
    return sum(node.target is torch.ops.fastgan.copies.default for node in graph.graph.nodes)


def test_only_graphs_that_may_read_a_changed_buffer_in_a_backward_copy():
    batch_norm = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1)).double()
    model = critic("parametrization")
    assert copies_in(penalty_first, model, *batch()) == 1
    assert copies_in(penalty_first, model.eval(), *batch()) == 0
    assert copies_in(penalty_first, batch_norm, *batch()) == 0

    def without_backward(D: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
        return penalty(D, real, fake).detach()

    assert copies_in(without_backward, model.train(), *batch()) == 0


def test_buffers_that_share_memory_stay_shared():
    class Sharing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 1)
            self.register_buffer("all", torch.zeros(4))
            self.register_buffer("last", self.all[2:])

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                self.all.add_(1)
            return self.layer(x * self.last[0])

    model = Sharing().double()
    model.last = model.all[2:]
    compiled = torch.compile(penalty, backend="aot_eager", fullgraph=True)
    compiled(model, *batch()).backward()
    assert model.last.tolist() == [1, 1]
    compiled(model, *batch()).backward()
    assert model.last.tolist() == [2, 2]
