"""Two ranks over gloo, each a process that runs this file, against one process with both batches."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

import fastgan
from fastgan import nn as fnn
from tests.distributed.processes import as_rank, found_by_ranks, needs_gloo

# (samples of each rank, shape of one, settings)
CASES = {
    "groups across the ranks": ((4, 4), (6, 3, 2), {"num_channels": 2}),
    "one group": ((2, 2), (5,), {"group_size": None}),
    "pairs across the ranks": ((3, 3), (4, 5), {"group_size": 2}),
    "batches of two sizes": ((3, 5), (4, 2, 3), {"group_size": 4}),
    "largest divisor": ((2, 4), (2, 3), {"remainder": "largest-divisor"}),
}


def batches(case):
    counts, shape, settings = CASES[case]
    generator = torch.Generator().manual_seed(1)
    channels = shape[0] + settings.get("num_channels", 1)
    x = torch.randn(sum(counts), *shape, dtype=torch.float64, generator=generator)
    scale = torch.randn(sum(counts), channels, *shape[1:], dtype=torch.float64, generator=generator)
    return x, scale, counts, settings


def results(layer, x, scale):
    """Values, first order, and the second through a penalty."""
    x, scale = x.clone().requires_grad_(), scale.clone().requires_grad_()
    y = layer(x)
    (grad,) = torch.autograd.grad((torch.tanh(y) * scale).sum(), x, create_graph=True)
    return [t.detach() for t in (y, grad, *torch.autograd.grad(grad.square().sum(), (x, scale)))]


def work(rank):
    found = {}
    for case in CASES:
        x, scale, counts, settings = batches(case)
        mine = slice(0, counts[0]) if rank == 0 else slice(counts[0], None)
        layer = fnn.MinibatchStdDev(**settings, process_group=dist.group.WORLD)
        found[case] = results(layer, x[mine], scale[mine])
    try:
        fnn.MinibatchStdDev(process_group=dist.group.WORLD)(torch.ones(3, 2))
    except ValueError as error:
        found["error"] = str(error)
    try:
        fastgan.ops.minibatch_stddev(torch.ones(4, 2), process_group=dist.group.WORLD, backend="cpu")
    except fastgan.BackendUnavailable as error:
        found["backend"] = str(error)
    half = fnn.MinibatchStdDev(process_group=dist.group.WORLD)(torch.ones(2, 2, dtype=torch.bfloat16))
    found["half"] = half
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return found_by_ranks(__file__, tmp_path_factory.mktemp("ranks"))


@needs_gloo
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_equal_one_process_on_both_batches(ranks, case):
    x, scale, counts, settings = batches(case)
    with fastgan.use_backend("reference"):
        expected = results(fnn.MinibatchStdDev(**settings), x, scale)
    for i, whole in enumerate(expected):
        actual = torch.cat([rank[case][i] for rank in ranks])
        torch.testing.assert_close(actual, whole, rtol=1e-10, atol=1e-12)
    # The result must depend on the other rank: one rank alone gives another result.
    alone = results(
        fnn.MinibatchStdDev(**{**settings, "remainder": "largest-divisor"}), x[: counts[0]], scale[: counts[0]]
    )
    assert not torch.allclose(alone[0], expected[0][: counts[0]])


@needs_gloo
def test_every_rank_names_the_global_batch_that_groups_do_not_divide(ranks):
    assert all("got N = 6 and groups of 4" in rank["error"] for rank in ranks)


@needs_gloo
def test_a_kernel_that_was_asked_for_by_name_is_not_replaced(ranks):
    assert all("minibatch_stddev_across_ranks has no cpu" in rank["backend"] for rank in ranks)


@needs_gloo
def test_half_precision_comes_out_as_it_went_in(ranks):
    for rank in ranks:
        assert rank["half"].dtype == torch.bfloat16
        torch.testing.assert_close(rank["half"][:, 2].float(), torch.full((2,), 1e-4), rtol=1e-2, atol=0)


if __name__ == "__main__":
    as_rank(work)
