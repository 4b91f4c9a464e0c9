"""Training with compiled networks: the numbers of the uncompiled game, and the same bits after a resumption."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch._dynamo.backends.registry import lookup_backend

from fastgan.trainer.config import ModelConfig, OptimConfig
from fastgan.trainer.data.sources import load_source
from fastgan.trainer.game import compiled
from fastgan.trainer.gan import GAN
from fastgan.trainer.verify import verify

pytestmark = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11), reason="before 2.11 a penalty breaks the graph"
)
CPU = torch.device("cpu")
MODEL = ModelConfig(width=4, latent_dim=4, spectral_norm="none")  # compiles in less time
OPTIM = OptimConfig(batch_size=8, penalty="r1", penalty_every=2)


@pytest.fixture(autouse=True)
def graphs(monkeypatch):
    """Compile as Inductor does, without its kernels, which takes seconds. Return the graphs that were compiled."""
    monkeypatch.undo()  # poisoned memory cannot be traced
    torch.compiler.reset()
    compiled.why_not.cache_clear()
    made = []

    def backend(graph, inputs):
        made.append(graph)
        return lookup_backend("aot_eager_decomp_partition")(graph, inputs)

    monkeypatch.setattr(compiled, "BACKEND", backend)
    yield made
    compiled.why_not.cache_clear()


def game(model=MODEL, **optim):
    return GAN(model, dataclasses.replace(OPTIM, **optim), load_source("ring8", 2, CPU), 0, CPU)


@pytest.mark.parametrize("penalty", ["r1", pytest.param("wgan-gp", marks=pytest.mark.long)])
def test_a_compiled_game_trains_as_an_uncompiled_one_and_goes_on_with_the_same_bits(penalty, graphs):
    ours, theirs = game(compile=True, penalty=penalty), game(penalty=penalty)
    for _ in range(2):  # the second step has no penalty
        torch.testing.assert_close(ours.step(), theirs.step(), rtol=1e-3, atol=1e-4)
    assert len(graphs) >= 6  # the check, D with and without a penalty, D for G, and G with and without gradients
    later = game(compile=True, penalty=penalty)
    later.load_state_dict(copy.deepcopy(ours.state_dict()))
    assert torch.equal(later.step(), ours.step())
    for a, b in zip(later.discriminator.parameters(), ours.discriminator.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_game_that_cannot_be_compiled_says_why_and_runs_uncompiled(monkeypatch, capsys):
    def broken(graph, inputs):
        raise OSError("no compiler here")

    monkeypatch.setattr(compiled, "BACKEND", broken)
    assert torch.equal(game(compile=True).step(), game().step())
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("compile: the networks run uncompiled")
    assert "no compiler here" in line


@pytest.mark.long
def test_verify_compares_the_compiled_game_with_pytorch(graphs):
    config = verify.VerifyConfig(dataset="ring8", compile=True)
    assert not verify.build(config, "torch", CPU).optim.compile
    steps = verify.compare(config, torch.float64, CPU, 2)
    assert len(graphs) > 4
    assert not any(step.errors.breaches() for step in steps)


def test_pytorchs_double_backward_cannot_be_compiled():
    with pytest.raises(ValueError, match="compile needs kernels fastgan"):
        OptimConfig(compile=True, kernels="torch")
