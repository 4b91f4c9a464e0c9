"""The tables of addresses that the kernels read, with a capture simulated on the CPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from fastgan.ops.spectral_norm import triton_plan as plans

MATRICES = ((1, 5, 7), (1, 1, 9))
ADDRESSES = ((2**40 + 8, 0, 3, 4, 5, 0), (7, 8, 0, 2**62, 11, 12))


@pytest.fixture
def plan():
    return plans.plan_of(MATRICES, (True, True), 4, torch.device("cpu"))


@pytest.fixture
def capture(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(plans, "_captured", {})


def expected_of(plan):
    return torch.tensor([a + r for a, r in zip(ADDRESSES, plan.rows, strict=True)])


def test_a_table_has_the_addresses_and_the_plan_of_each_weight(plan):
    assert torch.equal(plans.table_of(plan, ADDRESSES, torch.device("cpu")), expected_of(plan))


def test_a_captured_table_is_written_by_the_graph_and_kept_by_nobody(plan, capture, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", None)
    cached = plans._table.cache_info().currsize
    tables = [plans.table_of(plan, ADDRESSES, torch.device("cuda")) for _ in range(3)]
    assert all(torch.equal(table, expected_of(plan)) for table in tables)
    assert len({table.data_ptr() for table in tables}) == 3
    assert plans._table.cache_info().currsize == cached
    assert list(plans._captured) == [plan]
    assert torch.equal(plan.table[:, 6:], expected_of(plan)[:, 6:])
    assert not plan.table[:, :6].any()


def test_a_plan_is_not_made_in_a_capture(capture):
    with pytest.raises(RuntimeError, match="run the step once before the capture"):
        plans.plan_of(((1, 77, 5),), (True,), 4, torch.device("cuda"))


def test_a_captured_plan_lives_as_long_as_the_parameters_that_it_was_captured_with(plan, capture):
    models = [[torch.nn.Parameter(torch.ones(5, 7)), torch.nn.Parameter(torch.ones(1, 9))] for _ in range(2)]
    for weights in (*models, *models):
        plans.table_of(plan, ADDRESSES, torch.device("cuda"), weights)
    assert len(plans._captured[plan]) == 2  # not one for each capture
    del weights, models[1][0]
    plans.release()
    assert len(plans._captured[plan]) == 1
    models.clear()
    plans.release()
    assert not plans._captured


def test_a_captured_plan_is_kept_where_nothing_tells_that_its_graph_is_gone(plan, capture):
    plans.table_of(plan, ADDRESSES, torch.device("cuda"), [torch.ones(5, 7), torch.nn.Parameter(torch.ones(1, 9))])
    plans.release()
    assert list(plans._captured) == [plan]
