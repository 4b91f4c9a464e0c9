"""Penalties of discriminators that FSDP2 shards: the gradients of the mean over the ranks of each rank's own loss.

Each rank computes them too, with the whole model and every rank's samples.
"""

from __future__ import annotations

import copy
import os
import time

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import fastgan
from fastgan.nn import GradientPenalty, utils
from fastgan.ops.gradient_penalty import shards
from tests.distributed.processes import as_rank, found_by_ranks, needs_gloo

N = 3


def convolutions(*norms, activation=None, norm=lambda layer: layer):
    """5 and 7 channels, which two and four ranks share unevenly. Some ranks have no part of the single output."""
    activation = activation or nn.LeakyReLU(0.2)
    first, second, head = norm(nn.Conv2d(3, 5, 4, 2, 1)), norm(nn.Conv2d(5, 7, 3)), norm(nn.Linear(28, 1))
    return nn.Sequential(first, activation, second, *norms, activation, nn.Flatten(), head)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.read, self.head = nn.GRU(24, 6, batch_first=True), nn.Linear(6, 1)

    def forward(self, x):
        return self.head(self.read(x.flatten(1, 2).transpose(1, 2).contiguous())[0][:, -1])


class Twice(nn.Module):
    """One layer is called twice, and two layers share a weight."""

    def __init__(self):
        super().__init__()
        self.embed, self.inner, self.tied = nn.Linear(192, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.tied.weight = self.inner.weight
        self.head = nn.Linear(6, 1)

    def forward(self, x):
        h = F.relu(self.embed(x.flatten(1)))
        return self.head(F.relu(self.tied(F.relu(self.inner(F.relu(self.inner(h)))))))


class Frozen(nn.Sequential):
    def __init__(self):
        super().__init__(*convolutions())
        self[0].requires_grad_(False)


MODELS = {
    "affine": convolutions,
    "smooth": lambda: convolutions(activation=nn.SiLU()),
    "batch norm": lambda: convolutions(nn.BatchNorm2d(7)),
    "group norm": lambda: convolutions(nn.GroupNorm(7, 7)),
    "spectral norm": lambda: convolutions(norm=utils.spectral_norm),
    "fused spectral norm": lambda: utils.fuse_spectral_norm(convolutions(norm=utils.spectral_norm)),
    "PyTorch's spectral norm": lambda: convolutions(norm=parametrizations.spectral_norm),
    "PyTorch's older spectral norm": lambda: convolutions(norm=nn.utils.spectral_norm),
    "recurrent": Recurrent,
    "twice": Twice,
    "frozen": Frozen,
}


def layers(model):
    return [module for module in model.modules() if not list(module.children()) and list(module.parameters())]


def of_layers(model, mesh, **options):
    from torch.distributed.fsdp import fully_shard

    for layer in model.children():
        if list(layer.parameters()) and not isinstance(model, Twice):
            fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def of_whole(model, mesh, **options):
    from torch.distributed.fsdp import fully_shard

    return fully_shard(model, mesh=mesh, **options)


def of_groups(model, mesh, **options):
    from torch.distributed.fsdp import fully_shard

    children = [child for child in model.children() if list(child.parameters())]
    if not isinstance(model, Twice):
        fully_shard(children[:2], mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


SHARDED = {"whole": of_whole, "layers": of_layers, "groups": of_groups}


def r1(model, real, fake):
    logits, penalty = fastgan.logits_and_penalty(model, real, kind="r1")
    return F.softplus(-logits).mean() + penalty


def penalty_alone(model, real, fake):
    return fastgan.gradient_penalty(model, real, kind="r1+r2" if fake is not None else "r1", fake=fake)


def whole_step(model, real, fake):
    """Forwards with FSDP's hooks before and after the penalties."""
    loss = F.softplus(model(fake)).mean()
    logits, penalty = fastgan.logits_and_penalty(model, real, kind="r1")
    return loss + F.softplus(-logits).mean() + penalty + model(real).square().mean()


def lazy(model, real, fake):
    return GradientPenalty("r1", every=2)(model, real)


def inside_a_function(model, real, fake):
    return fastgan.gradient_penalty(lambda x: model(x), real, kind="r1")


def approximate(model, real, fake):
    return fastgan.gradient_penalty(model, real, kind="r1-finite-difference")


LOSSES = {f.__name__: f for f in (r1, penalty_alone, whole_step, lazy, inside_a_function)}
HALF = {f.__name__: f for f in (r1, penalty_alone, approximate)}
PARTS = "affine", "smooth", "fused spectral norm"
EVERY = os.environ.get("FASTGAN_TESTS") == "all"  # otherwise each model and loss with the ways in turn
CASES = [
    (model, way, "r1")
    for i, model in enumerate(MODELS)
    for j, way in enumerate(SHARDED)
    if EVERY or i % len(SHARDED) == j
] + [
    (model, way, loss)
    for i, model in enumerate(PARTS)
    for j, loss in enumerate(LOSSES)
    for k, way in enumerate(("whole", "layers"))
    if loss != "r1" and (EVERY or (i + j) % 2 == k)
]


def built(name):
    torch.manual_seed(0)
    return MODELS[name]().double()


def data(ranks):
    torch.manual_seed(5)
    return torch.randn(2, ranks, N, 3, 8, 8, dtype=torch.float64)


def gradients(model):
    """Return the gradients by name. None counts as zeros, because some ranks have no part of a parameter."""
    whole = ((name, p, p.grad) for name, p in model.named_parameters())
    return {name: torch.zeros(p.shape, dtype=p.dtype) if grad is None else whole_of(grad) for name, p, grad in whole}


def whole_of(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def mean_of_ranks(model, loss, ranks):
    """Return the mean of the ranks' gradients, computed with the whole model."""
    total = {}
    for real, fake in zip(*data(ranks), strict=True):
        own = copy.deepcopy(model)
        loss(own, real, fake).backward()
        for name, grad in gradients(own).items():
            total[name] = total.get(name, 0) + grad / ranks
    return total


def case(mesh, name, way, loss):
    expected = mean_of_ranks(built(name), LOSSES[loss], dist.get_world_size())
    model = SHARDED[way](built(name), mesh)
    real, fake = data(dist.get_world_size())[:, dist.get_rank()]
    LOSSES[loss](model, real, fake).backward()
    parts = all(p.grad is None or p.grad.placements == p.placements for p in model.parameters())
    return gradients(model), expected, parts


def accumulated(mesh):
    """Two micro-batches, the first without FSDP's reduction."""
    expected = mean_of_ranks(built("affine"), lambda m, a, b: whole_step(m, a, b) + r1(m, b, a), dist.get_world_size())
    model = of_layers(built("affine"), mesh)
    real, fake = data(dist.get_world_size())[:, dist.get_rank()]
    model.set_requires_gradient_sync(False)
    whole_step(model, real, fake).backward()
    model.set_requires_gradient_sync(True)
    (r1(model, fake, real) + 0 * model(real).sum()).backward()
    return gradients(model), expected, True


def several_steps(mesh):
    """Train. The next step reads the shards that the optimizer has updated."""
    whole, model = built("affine"), of_layers(built("affine"), mesh)
    real, fake = data(dist.get_world_size())[:, dist.get_rank()]
    for _ in range(3):
        means = mean_of_ranks(whole, whole_step, dist.get_world_size())
        whole_step(model, real, fake).backward()
        found = gradients(model)
        torch.optim.SGD(model.parameters(), 0.01).step()
        model.zero_grad()
        with torch.no_grad():
            for name, p in whole.named_parameters():
                p -= 0.01 * means[name]
    return found, means, True


def divided_otherwise(mesh):
    model = of_layers(built("affine"), mesh)
    for module in model.modules():
        if hasattr(module, "set_gradient_divide_factor"):
            module.set_gradient_divide_factor(0.5)
    real, fake = data(dist.get_world_size())[:, dist.get_rank()]
    r1(model, real, fake).backward()
    means = mean_of_ranks(built("affine"), r1, dist.get_world_size())
    return gradients(model), {name: 2 * dist.get_world_size() * mean for name, mean in means.items()}, True


def half_precision(mesh, loss):
    """Return the dtypes, and the errors against float64 of a model with bfloat16 weights, whole and sharded."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    ranks = dist.get_world_size()
    exact = mean_of_ranks(built("affine"), HALF[loss], ranks)
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, torch.float32)
    model = of_layers(built("affine").float(), mesh, mp_policy=policy)
    real, fake = data(ranks)[:, dist.get_rank()].float()
    HALF[loss](model, real, fake).backward()

    def rounded(m, a, b):
        return HALF[loss](m, a.bfloat16(), b.bfloat16())

    alone = mean_of_ranks(built("affine").bfloat16(), rounded, ranks)
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

    real = data(dist.get_world_size())[0, dist.get_rank()]

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
    real = data(dist.get_world_size())[0, dist.get_rank()]
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
    real = data(dist.get_world_size())[0, dist.get_rank()]
    before = [[*m._forward_pre_hooks.values(), *m._forward_hooks.values()] for m in model.modules()]
    parameters = list(model.parameters())
    fastgan.gradient_penalty(model, real, kind="r1").backward()
    failed = said_of(lambda: fastgan.gradient_penalty(model, real[:, :2], kind="r1"))
    after = [[*m._forward_pre_hooks.values(), *m._forward_hooks.values()] for m in model.modules()]
    same = all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    return before == after and same and "__call__" not in vars(FSDPModule) and failed is not None


def work(rank):
    ranks = dist.get_world_size()
    mesh = init_device_mesh("cpu", (ranks,))
    if ranks == 4:
        meshes = {"flat": mesh, "replicated twice": init_device_mesh("cpu", (2, 2), mesh_dim_names=("copy", "shard"))}
        return {
            (mesh, name, way): case(meshes[mesh], name, way, "whole_step")
            for i, mesh in enumerate(meshes)
            for j, name in enumerate(("affine", "fused spectral norm"))
            for k, way in enumerate(("whole", "layers"))
            if EVERY or (i + j) % 2 == k
        }
    found = {each: case(mesh, *each) for each in CASES}
    found |= {f.__name__: f(mesh) for f in (accumulated, several_steps, divided_otherwise)}
    found |= {("half", loss): half_precision(mesh, loss) for loss in HALF}
    found |= {f.__name__: f(mesh) for f in (largest_in_memory, untouched)}
    found["explain"] = fastgan.explain_penalty(of_layers(built("affine"), mesh), data(ranks)[0, rank])
    found["refusals"] = refusals(mesh)
    return found


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory):
    return found_by_ranks(__file__, tmp_path_factory.mktemp("ranks"))


def check(found):
    gradients, expected, parts = found
    assert parts
    assert gradients.keys() == expected.keys()
    for name, grad in gradients.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-9, atol=1e-12)


@needs_gloo
@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_gradients_are_the_mean_over_the_ranks(of_ranks, case):
    for found in of_ranks:
        check(found[case])


@needs_gloo
@pytest.mark.parametrize("name", ["accumulated", "several_steps", "divided_otherwise"])
def test_training_as_fsdp_averages(of_ranks, name):
    for found in of_ranks:
        check(found[name])


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


@needs_gloo
def test_four_ranks_flat_and_with_replicas(tmp_path_factory):
    for found in found_by_ranks(__file__, tmp_path_factory.mktemp("four"), ranks=4):
        for each in found.values():
            check(each)


if __name__ == "__main__":
    as_rank(work)
