"""Two processes over gloo compute the same as one process with all samples."""

from __future__ import annotations

import pytest
import torch
from torch import distributed as dist

from fastgan import ops
from tests.distributed.processes import RANKS, as_rank, found_by_ranks, needs_gloo

N, B, C = 13, 9, 4
OPTIONS = {"others": (True, False), "oneself too": (False, False), "segments": (True, True)}
DTYPES = {"float64": (torch.float64, 1e-11), "float32": (torch.float32, 1e-4), "bfloat16": (torch.bfloat16, 3e-2)}


def everyones(dtype):
    generator = torch.Generator().manual_seed(0)
    m = torch.randn(RANKS * N, B, C, generator=generator, dtype=torch.float64).to(dtype) / C
    scale = torch.randn(RANKS * N, B, generator=generator, dtype=torch.float64).to(dtype)
    return m, scale, torch.arange(RANKS * N) % 3


def results(m, scale, segments, exclude_self, backend, group):
    """Return values, first order, and second order through a penalty, for the samples of this process."""
    m, scale = m.requires_grad_(), scale.requires_grad_()
    o = ops.minibatch_discrimination(
        m, exclude_self=exclude_self, segments=segments, process_group=group, backend=backend
    )
    (plain,) = torch.autograd.grad(o, m, scale.detach(), retain_graph=True)
    (grad,) = torch.autograd.grad((o.square() * scale).sum(), m, create_graph=True)
    return [o.detach(), plain, grad.detach(), *torch.autograd.grad(grad.square().sum(), (m, scale))]


def each_case():
    for backend in ("cpu", "reference"):
        for option, dtype in (*((o, "float64") for o in OPTIONS), ("segments", "float32"), ("others", "bfloat16")):
            yield backend, option, dtype


def work(rank):
    own, found = slice(rank * N, (rank + 1) * N), {}
    for case in each_case():
        backend, option, dtype = case
        exclude_self, with_segments = OPTIONS[option]
        m, scale, segments = (t[own].clone() for t in everyones(DTYPES[dtype][0]))
        found[case] = results(m, scale, segments if with_segments else None, exclude_self, backend, dist.group.WORLD)
    return found


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory):
    return found_by_ranks(__file__, tmp_path_factory.mktemp("ranks"))


@needs_gloo
@pytest.mark.parametrize("case", list(each_case()), ids="-".join)
def test_two_ranks_equal_one_process_on_the_concatenated_batch(of_ranks, case):
    backend, option, dtype = case
    exclude_self, with_segments = OPTIONS[option]
    m, scale, segments = everyones(DTYPES[dtype][0])
    expected = results(m, scale, segments if with_segments else None, exclude_self, backend, None)
    for own, whole in zip(zip(*(found[case] for found in of_ranks), strict=True), expected, strict=True):
        actual = torch.cat(own)
        assert actual.dtype == whole.dtype
        assert (actual - whole).norm() <= DTYPES[dtype][1] * whole.norm()


if __name__ == "__main__":
    as_rank(work)
