"""Deferred mode: work runs as late as a GPU may run it, so code that does not wait for it reads old memory."""

from __future__ import annotations

import os

import pytest
import torch
from torch import nn

from fastgan import ops

if os.environ.get("SIMULATED_GPU_DEFERRED", "0") == "0":
    pytest.skip("needs SIMULATED_GPU_DEFERRED=1", allow_module_level=True)


@pytest.fixture
def side():
    return torch.cuda.Stream()


def test_a_stream_is_in_order():
    x = torch.zeros(3, device="cuda")
    for i in range(5):
        x = x * 2 + i
    assert x.tolist() == [26, 26, 26]


def test_a_missing_wait_stream_shows(side):
    x = torch.ones(3, device="cuda")
    with torch.cuda.stream(side):
        y = x * 2
    assert torch.isnan(y).all().item()


def test_wait_stream_is_enough(side):
    x = torch.ones(3, device="cuda")
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        y = x * 2
    torch.cuda.current_stream().wait_stream(side)
    assert y.tolist() == [2, 2, 2]


def test_a_stream_that_starts_too_early_shows(side):
    x = torch.full((3,), 2.0, device="cuda") + 1
    with torch.cuda.stream(side):
        y = x * 2
    side.synchronize()
    with torch.cuda.stream(side):
        assert y.isnan().all().item()


def test_an_event_orders_what_came_before_it_alone(side):
    x = torch.ones(3, device="cuda")
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        x += 1
        event = side.record_event()
        x += 10
    event.wait()
    assert x.tolist() == [2, 2, 2]
    side.synchronize()
    assert x.tolist() == [12, 12, 12]


def test_memory_that_another_stream_reads_is_not_kept_without_record_stream(side):
    x = torch.ones(3, device="cuda")
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        y = x * 2
    del x
    side.synchronize()
    with torch.cuda.stream(side):
        assert y.isnan().all().item()


def test_record_stream_keeps_it(side):
    x = torch.ones(3, device="cuda")
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        y = x * 2
    x.record_stream(side)
    del x
    side.synchronize()
    with torch.cuda.stream(side):
        assert y.tolist() == [2, 2, 2]


def test_waiting_for_the_reader_keeps_it_too(side):
    x = torch.ones(3, device="cuda")
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        y = x * 2
    torch.cuda.current_stream().wait_stream(side)
    del x
    torch.cuda.synchronize()
    assert y.tolist() == [2, 2, 2]


def test_the_host_reads_an_old_value_before_it_waits():
    host = torch.zeros(3, pin_memory=True)
    host.copy_(torch.ones(3, device="cuda"), non_blocking=True)
    assert host.tolist() == [0, 0, 0]
    torch.cuda.synchronize()
    assert host.tolist() == [1, 1, 1]


def test_page_locked_memory_that_changes_before_its_copy_shows():
    host = torch.ones(3, pin_memory=True)
    device = host.to("cuda", non_blocking=True)
    host.fill_(7)
    assert device.tolist() == [7, 7, 7]


def test_pageable_memory_is_copied_at_the_launch():
    host = torch.ones(3)
    device = host.to("cuda", non_blocking=True)
    host.fill_(7)
    assert device.tolist() == [1, 1, 1]


def test_a_number_on_the_host_goes_with_the_launch():
    number = torch.tensor(2.0)
    x = torch.ones(3, device="cuda") * number
    number.fill_(9)
    assert x.tolist() == [2, 2, 2]


def test_numbers_are_drawn_in_the_order_of_launches(side):
    torch.cuda.manual_seed(1)
    with torch.cuda.stream(side):
        first = torch.rand(3, device="cuda")
    second = torch.rand(3, device="cuda")
    values = second.tolist()
    torch.cuda.synchronize()
    torch.cuda.manual_seed(1)
    assert torch.rand(3, device="cuda").tolist() == first.tolist()
    assert torch.rand(3, device="cuda").tolist() == values


def test_errors_in_kernels_come_late():
    indices = torch.zeros(1, dtype=torch.int64, device="cuda")
    torch.cuda.synchronize()
    indices.fill_(40)
    embedded = nn.functional.embedding(indices, torch.ones(3, 2, device="cuda"))
    with pytest.raises(RuntimeError, match=r"work that was launched before failed .*index out of range"):
        embedded.sum().item()


def test_indices_that_are_not_there_yet_are_waited_for():
    table = torch.arange(6.0, device="cuda").view(3, 2)
    indices = torch.full((1,), 41, device="cuda") - 40
    assert nn.functional.embedding(indices, table).tolist() == [[2, 3]]


def test_a_loop_of_queries_ends():
    x = torch.ones(3, device="cuda")
    for _ in range(10):
        x = x + 1
    event = torch.cuda.current_stream().record_event()
    asked = 0
    while not event.query():
        asked += 1
    assert 0 < asked < 100


def test_a_graph_replays_in_the_order_of_its_stream(side):
    x, graph = torch.ones(3, device="cuda"), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = x * 2
    x.fill_(4)
    graph.replay()
    with torch.cuda.stream(side):
        stale = y + 0
        assert stale.isnan().all().item()
    assert y.tolist() == [8, 8, 8]


def test_a_plan_of_spectral_norm_outlives_its_use_on_every_stream(side):
    pytest.importorskip("triton")
    from fastgan.ops.spectral_norm import triton_plan as plans

    plan = plans.plan_of(((1, 4, 6),), (True,), 4, torch.device("cuda", 0))
    expected = plan.parts.tolist()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        plans.table_of(plan, ((0, 0, 0, 0, 0, 0),), torch.device("cuda", 0))
        read = plan.parts + 0
    del plan
    plans.plan_of.cache_clear()
    side.synchronize()
    with torch.cuda.stream(side):
        assert read.tolist() == expected


def test_spectral_norm_runs_on_two_streams(side):
    pytest.importorskip("triton")
    weight, u, v = (torch.randn(*shape, device="cuda") for shape in ((4, 6), (4,), (6,)))
    options = dict(update=False, backend="triton")
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        (there,) = ops.spectral_norm([weight], [u], [v], **options)
    (here,) = ops.spectral_norm([weight], [u], [v], **options)
    torch.cuda.current_stream().wait_stream(side)
    torch.testing.assert_close(there, here, rtol=0, atol=0)
    torch.testing.assert_close(here, ops.spectral_norm([weight], [u], [v], update=False, backend="reference")[0])


def test_training_is_the_cpus():
    def step(device):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 1))
        x = torch.randn(2, 3, 8, 8)
        model, x = model.to(device), x.to(device)
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        for _ in range(3):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        return {name: value.cpu() for name, value in model.state_dict().items()}

    torch.testing.assert_close(step("cuda"), step("cpu"), rtol=0, atol=0)
