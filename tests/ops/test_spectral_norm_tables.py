"""The tables of addresses that a CUDA graph reads at each replay, with page-locked memory and a device played."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from fastgan.ops.spectral_norm import triton_plan as plans

CUDA = torch.device("cuda")


@pytest.fixture
def machine(monkeypatch):
    """A CUDA device of which tensors stay on the CPU; ``capturing`` is to be set."""
    state = {"capturing": False, "pinned": 0}
    zeros = torch.zeros

    def pinned(*size, pin_memory=False, **options):
        state["pinned"] += pin_memory
        return zeros(*size, **options)

    def pin_memory(tensor):
        assert not state["capturing"], "page-locked memory is asked for in a capture"
        state["pinned"] += 1
        return tensor.clone()

    monkeypatch.setattr(plans, "_spare", [])
    monkeypatch.setattr(plans, "_captured", [])
    monkeypatch.setattr(torch, "zeros", pinned)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *where, **how: tensor.clone())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state["capturing"])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    plans._table.cache_clear()
    yield state
    plans._table.cache_clear()


def test_a_capture_asks_for_no_page_locked_memory_and_keeps_what_its_replays_read(machine):
    plan = plans.plan_of(((1, 5, 7), (1, 1, 9)), (True, True), 4, torch.device("cpu"))
    addresses = tuple((i, 2, 3, 4, 5, 6) for i in range(2))
    expected = torch.tensor([a + r for a, r in zip(addresses, plan.rows, strict=True)])
    assert torch.equal(plans.table_of(plan, addresses, CUDA), expected)

    machine["capturing"], before = True, machine["pinned"]
    tables = [plans.table_of(plan, addresses, CUDA) for _ in range(3)]
    assert machine["pinned"] == before
    assert all(torch.equal(table, expected) for table in tables)
    hosts = [host for host, _, kept in plans._captured if kept is plan]
    assert len({host.data_ptr() for host in hosts}) == 3
    assert all(torch.equal(host, expected) for host in hosts)


def test_calls_between_captures_make_up_for_what_they_took(machine):
    plan = plans.plan_of(((1, 5, 7),), (True,), 4, torch.device("cpu"))
    plans.table_of(plan, ((1, 2, 3, 4, 5, 6),), CUDA)
    machine["capturing"] = True
    while len(plans._spare[0]) >= plans._SPARE // 2:
        plans.table_of(plan, ((1, 2, 3, 4, 5, 6),), CUDA)
    machine["capturing"] = False
    plans.table_of(plan, ((1, 2, 3, 4, 5, 6),), CUDA)
    assert len(plans._spare[0]) == plans._SPARE
