"""Penalties of discriminators that FSDP2 shards: the gradients of the mean over the ranks of each rank's own loss."""

from __future__ import annotations

import time

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint

import fastgan
from fastgan.ops.gradient_penalty import shards
from tests.distributed.processes import as_rank, found_by_ranks, needs_gloo
from tests.distributed.sharded_problem import (
    EVERY,
    LOSSES,
    MODELS,
    SHARDED,
    built,
    case,
    check,
    convolutions,
    data,
    gradients,
    mean_of_ranks,
    of_layers,
    of_whole,
    r1,
)

PARTS = "affine", "smooth", "fused spectral norm"
HALF = "r1", "penalty_alone", "approximate"
CASES = [
    (model, way, "r1")
    for i, model in enumerate(MODELS)
    for j, way in enumerate(SHARDED)
    if EVERY or i % len(SHARDED) == j
] + [
    (model, way, loss)
    for i, model in enumerate(PARTS)
    for j, loss in enumerate(("penalty_alone", "whole_step", "lazy", "inside_a_function"))
    for k, way in enumerate(("whole", "layers"))
    if EVERY or (i + j) % 2 == k
]


def half_precision(mesh, loss):
    """Return the dtypes, and the errors against float64 of a model with bfloat16 weights, whole and sharded."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    exact = mean_of_ranks(built("affine"), LOSSES[loss])
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, torch.float32)
    model = of_layers(built("affine").float(), mesh, mp_policy=policy)
    LOSSES[loss](model, *data().float()).backward()
    alone = mean_of_ranks(built("affine").bfloat16(), lambda m, a, b: LOSSES[loss](m, a.bfloat16(), b.bfloat16()))
    errors = [
        {name: ((grads[name].double() - g).norm() / g.norm()).item() for name, g in exact.items() if g.norm() > 0}
        for grads in (gradients(model), alone)
    ]
    return errors, {p.grad.dtype for p in model.parameters() if p.grad is not None}


class Method(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = convolutions()

    def forward(self, x):
        return self.model(x)

    def score(self, x):
        return self.model(x)


class Checkpointed(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=False)


def said_of(call):
    try:
        call()
    except RuntimeError as error:
        return str(error)
    return None


def refusals(mesh):
    from torch.distributed.fsdp import FullyShardedDataParallel, register_fsdp_forward_method
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    real = data()[0]

    def from_logits():
        model, x = of_layers(built("affine"), mesh), real.clone().requires_grad_()
        fastgan.penalty_from_logits(model(x), x)

    def method():
        model = of_whole(Method().double(), mesh)
        register_fsdp_forward_method(model, "score")
        fastgan.gradient_penalty(model.score, real, kind="r1")

    def fsdp1():
        fastgan.gradient_penalty(FullyShardedDataParallel(built("affine"), device_id="cpu"), real, kind="r1")

    def fsdp1_in_a_function():
        model = FullyShardedDataParallel(built("affine"), device_id="cpu")
        fastgan.logits_and_penalty(lambda x: model(x), real, kind="r1")

    def split(shard):
        model = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, 1)).double()
        model[1] = parallelize_module(model[1], mesh, ColwiseParallel(output_layouts=None))
        return of_whole(model, mesh) if shard else model

    def tensor_parallel():
        fastgan.gradient_penalty(split(False), real, kind="r1")

    def tensor_parallel_in_a_function():
        model = nn.Sequential(nn.Flatten(), parallelize_module(nn.Linear(192, 8).double(), mesh, ColwiseParallel()))
        fastgan.gradient_penalty(lambda x: model(x), real, kind="r1")

    def step_in_between():
        model = of_layers(built("smooth"), mesh)
        loss = r1(model, real, None)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(1.0)
        loss.backward()

    def checkpoint_of_a_sharded_layer():
        model = nn.Sequential(nn.Flatten(), Checkpointed(of_whole(nn.Linear(192, 4).double(), mesh)))
        fastgan.gradient_penalty(model, real, kind="r1")

    def checkpoint_in_a_sharded_layer():
        model = nn.Sequential(nn.Flatten(), Checkpointed(nn.Linear(192, 4).double()))
        fastgan.gradient_penalty(of_whole(model, mesh), real, kind="r1")

    def in_place():
        """Autograd raises the same error."""

        def spoiled(x):
            h = torch.exp(model[:1](x))
            logits = model[1:](h.sigmoid())
            h.add_(1.0)
            return logits

        model = of_layers(built("smooth"), mesh)
        fastgan.gradient_penalty(lambda x: spoiled(x), real, kind="r1")

    calls = from_logits, method, fsdp1, fsdp1_in_a_function, tensor_parallel, tensor_parallel_in_a_function
    calls += checkpoint_of_a_sharded_layer, checkpoint_in_a_sharded_layer, step_in_between, in_place
    return {call.__name__: said_of(call) for call in calls}


def largest_in_memory(mesh):
    """Count gathered weights: the most in memory at once, those in memory when the loss exists, and all."""
    model = nn.Sequential(
        nn.Flatten(), *(nn.Linear(192, 192, bias=False) for _ in range(4)), nn.Linear(192, 1)
    ).double()
    model = of_layers(model, mesh)
    real = data()[0]
    gathered, most = [], 0
    original = shards.Sharded.gathered

    def counting(sharded, local):
        nonlocal most
        whole = original(sharded, local)
        gathered.append(shards.StorageWeakRef(whole.untyped_storage()))
        most = max(most, sum(not each.expired() for each in gathered))
        return whole

    shards.Sharded.gathered = counting
    loss = r1(model, real, None)
    for _ in range(100):  # a thread of gloo may hold the last result for a moment
        between = sum(not each.expired() for each in gathered)
        if not between:
            break
        time.sleep(0.01)
    loss.backward()
    shards.Sharded.gathered = original
    return most, between, len(gathered)


def untouched(mesh):
    """After a penalty, and after one that failed, FSDP's modules are as they were."""
    from torch.distributed.fsdp import FSDPModule

    model = of_layers(built("affine"), mesh)
    real = data()[0]
    before = [[*m._forward_pre_hooks.values(), *m._forward_hooks.values()] for m in model.modules()]
    parameters = list(model.parameters())
    fastgan.gradient_penalty(model, real, kind="r1").backward()
    failed = said_of(lambda: fastgan.gradient_penalty(model, real[:, :2], kind="r1"))
    after = [[*m._forward_pre_hooks.values(), *m._forward_hooks.values()] for m in model.modules()]
    same = all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    return before == after and same and "__call__" not in vars(FSDPModule) and failed is not None


def work(rank):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    found = {each: case(mesh, *each) for each in CASES}
    found |= {("half", loss): half_precision(mesh, loss) for loss in HALF}
    found |= {f.__name__: f(mesh) for f in (largest_in_memory, untouched, refusals)}
    found["explain"] = fastgan.explain_penalty(of_layers(built("affine"), mesh), data()[0])
    return found


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory):
    return found_by_ranks(__file__, tmp_path_factory.mktemp("ranks"))


@needs_gloo
@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_gradients_are_the_mean_over_the_ranks(of_ranks, case):
    for found in of_ranks:
        check(found[case])


@needs_gloo
@pytest.mark.parametrize("loss", HALF)
def test_half_precision_by_a_policy_is_as_exact_as_a_model_in_half_precision(of_ranks, loss):
    for found in of_ranks:
        (sharded, alone), dtypes = found["half", loss]
        assert dtypes == {torch.float32}
        for name, error in sharded.items():
            assert error <= 2 * alone[name] + 0.005, name


@needs_gloo
def test_one_pass_of_a_sharded_discriminator(of_ranks):
    assert [found["explain"] for found in of_ranks] == ["one pass"] * len(of_ranks)


@needs_gloo
def test_at_most_two_layers_of_six_are_in_memory(of_ranks):
    for found in of_ranks:
        most, between, gathers = found["largest_in_memory"]
        assert most <= 2
        assert between == 0
        assert gathers > 5  # they were gathered again


@needs_gloo
def test_a_penalty_restores_fsdps_modules(of_ranks):
    assert all(found["untouched"] for found in of_ranks)


SAID = {
    "from_logits": "penalty_from_logits is not supported",
    "method": "not one of its methods",
    "fsdp1": "FullyShardedDataParallel (FSDP1)",
    "fsdp1_in_a_function": "FullyShardedDataParallel (FSDP1)",
    "tensor_parallel": "tensor parallelism",
    "tensor_parallel_in_a_function": "tensor parallelism",
    "checkpoint_of_a_sharded_layer": "does not support torch.utils.checkpoint",
    "checkpoint_in_a_sharded_layer": "does not support torch.utils.checkpoint",
    "step_in_between": "call backward before the optimizer's step",
    "in_place": "modified",
}


@needs_gloo
@pytest.mark.parametrize("name", SAID)
def test_unsupported_uses_raise(of_ranks, name):
    for found in of_ranks:
        assert SAID[name] in (found["refusals"][name] or "")


if __name__ == "__main__":
    as_rank(work)
