"""Training steps of discriminators that FSDP2 shards over four ranks: accumulated gradients, replicas, optimizers."""

from __future__ import annotations

import pytest
import torch
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from fastgan.ops.gradient_penalty import shards
from tests.distributed.processes import as_rank, found_by_ranks, needs_gloo
from tests.distributed.sharded_problem import (
    EVERY,
    LOSSES,
    SHARDED,
    built,
    case,
    check,
    data,
    gradients,
    mean_of_ranks,
    of_layers,
    penalty_alone,
    plain,
    r1,
    whole_step,
)

ONE_STEP = [
    (mesh, name, way)
    for i, mesh in enumerate(("flat", "replicated"))
    for j, name in enumerate(("affine", "fused spectral norm"))
    for k, way in enumerate(("whole", "layers"))
    if EVERY or (i + j) % 2 == k
]
# The losses of micro-batches. FSDP synchronizes in the last one, in full or first without its all-reduce.
ORDERS = [
    ("plain", "penalty_alone"),
    ("plain", "r1"),
    ("penalty_alone", "plain"),
    ("r1", "penalty_alone"),
    ("plain", "penalty_alone", "r1"),
    ("penalty_alone", "plain", "r1"),
    ("r1", "penalty_alone", "whole_step"),
    ("whole_step", "r1", "penalty_alone"),
]
KEPT = "no synchronization", "no all-reduce", "both in turn"
ACCUMULATED = [
    (order, name, way, mesh, kept)
    for i, order in enumerate(ORDERS)
    for j, name in enumerate(("affine", "smooth"))
    for k, (way, mesh, kept) in enumerate(
        (
            ("layers", "flat", KEPT[0]),
            ("whole", "replicated", KEPT[0]),
            ("groups", "replicated", KEPT[1]),
            ("layers", "replicated", KEPT[2]),
        )
    )
    if EVERY or (i + 2 * j) % 4 == k
]


def set_kept(model, kept, i, last):
    """Let FSDP keep the gradients of micro-batch i."""
    model.set_requires_gradient_sync(last or kept == KEPT[1] or (kept == KEPT[2] and i % 2 == 1))
    if not last:
        model.set_requires_all_reduce(False)


def accumulated(meshes, order, name, way, mesh, kept):
    """Return what `case` does, and how many gradients were reduced although FSDP keeps them."""
    model, whole = SHARDED[way](built(name), meshes[mesh]), built(name)
    with torch.no_grad():
        model(data()[0])  # FSDP has no place for gradients before its first forward
    expected, reduced = {}, 0
    original = shards.Sharded.reduced

    def counting(sharded, grad):
        nonlocal reduced
        reduced += not sharded.accumulation.group.reduce_grads
        return original(sharded, grad)

    shards.Sharded.reduced = counting
    for i, loss in enumerate(order):
        set_kept(model, kept, i, i == len(order) - 1)
        samples = data() * (1 + i)
        LOSSES[loss](model, *samples).backward()
        means = mean_of_ranks(whole, lambda m, *_, loss=loss, samples=samples: LOSSES[loss](m, *samples))
        expected = {name: expected.get(name, 0) + mean for name, mean in means.items()}
    shards.Sharded.reduced = original
    return (gradients(model), expected, True), reduced


def kept_before_the_first_forward(meshes):
    model = of_layers(built("affine"), meshes["flat"])
    model.set_requires_gradient_sync(False)
    r1(model, *data()).backward()
    plain(model, *data()).backward()
    model.set_requires_gradient_sync(True)
    r1(model, *data()).backward()
    expected = mean_of_ranks(built("affine"), lambda m, a, b: 2 * r1(m, a, b) + plain(m, a, b))
    return gradients(model), expected, True


def in_two_dtypes(meshes):
    """Gradients that FSDP keeps in float32, of bfloat16 weights, and the same gradients, each reduced at once."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    found = []
    for sync in (False, True):
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, torch.float32)
        model = of_layers(built("affine").float(), meshes["flat"], mp_policy=policy)
        for order in (("plain", "penalty_alone", "plain"), ("plain", "penalty_alone")):
            for i, loss in enumerate(order):
                model.set_requires_gradient_sync(sync or i == len(order) - 1)
                LOSSES[loss](model, *data().float()).backward()
        found.append(gradients(model))
    return found


def several_steps(meshes):
    """Train. The next step reads the shards that the optimizer has updated."""
    whole, model = built("affine"), of_layers(built("affine"), meshes["flat"])
    for _ in range(3):
        means = mean_of_ranks(whole, whole_step)
        whole_step(model, *data()).backward()
        found = gradients(model)
        torch.optim.SGD(model.parameters(), 0.01).step()
        model.zero_grad()
        with torch.no_grad():
            for name, p in whole.named_parameters():
                p -= 0.01 * means[name]
    return found, means, True


def evaluated_between_steps(meshes):
    """Outputs without gradients, which leave the root's weights whole, before and after a step of a penalty alone."""
    whole, model, found, expected = built("affine"), SHARDED["whole"](built("affine"), meshes["flat"]), {}, {}
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for step in ("before", "after"):
        with torch.no_grad():
            found[step], expected[step] = model(data()[0]), whole(data()[0])
        means = mean_of_ranks(whole, penalty_alone)
        penalty_alone(model, *data()).backward()
        optimizer.step()
        with torch.no_grad():
            for name, p in whole.named_parameters():
                p -= 0.01 * means[name]
    return found, expected, True


def divided_otherwise(meshes):
    model = of_layers(built("affine"), meshes["flat"])
    for module in model.modules():
        if hasattr(module, "set_gradient_divide_factor"):
            module.set_gradient_divide_factor(0.5)
    model.set_requires_gradient_sync(False)
    plain(model, *data()).backward()
    model.set_requires_gradient_sync(True)
    r1(model, *data()).backward()
    means = mean_of_ranks(built("affine"), lambda m, a, b: plain(m, a, b) + r1(m, a, b))
    return gradients(model), {name: 2 * dist.get_world_size() * mean for name, mean in means.items()}, True


def work(rank):
    meshes = {
        "flat": init_device_mesh("cpu", (4,)),
        "replicated": init_device_mesh("cpu", (2, 2), mesh_dim_names=("copy", "shard")),
    }
    found = {(mesh, name, way): case(meshes[mesh], name, way, "whole_step") for mesh, name, way in ONE_STEP}
    found |= {each: accumulated(meshes, *each) for each in ACCUMULATED}
    steps = several_steps, evaluated_between_steps, divided_otherwise, kept_before_the_first_forward, in_two_dtypes
    return found | {f.__name__: f(meshes) for f in steps}


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory):
    return found_by_ranks(__file__, tmp_path_factory.mktemp("ranks"), ranks=4)


@needs_gloo
@pytest.mark.parametrize("case", ONE_STEP, ids="-".join)
def test_four_ranks_flat_and_with_replicas(of_ranks, case):
    for found in of_ranks:
        check(found[case])


@needs_gloo
@pytest.mark.parametrize("case", ACCUMULATED, ids=lambda case: " ".join(("-".join(case[0]), *case[1:])))
def test_gradients_that_fsdp_keeps_are_reduced_with_the_last_micro_batch(of_ranks, case):
    for found in of_ranks:
        sums, reduced = found[case]
        check(sums)
        assert reduced == 0


@needs_gloo
def test_kept_gradients_have_one_dtype(of_ranks):
    for found in of_ranks:
        kept, reduced = found["in_two_dtypes"]
        for name, grad in kept.items():
            torch.testing.assert_close(grad, reduced[name], rtol=1e-5, atol=1e-6)


@needs_gloo
@pytest.mark.parametrize(
    "name", ["several_steps", "evaluated_between_steps", "divided_otherwise", "kept_before_the_first_forward"]
)
def test_training_as_fsdp_averages(of_ranks, name):
    for found in of_ranks:
        check(found[name])


if __name__ == "__main__":
    as_rank(work)
