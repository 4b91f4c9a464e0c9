"""CUDA graphs on the simulated device: values exist after the first replay, and calls that a capture forbids raise."""

from __future__ import annotations

import gc
from contextlib import contextmanager

import pytest
import torch

from fastgan import ops


@contextmanager
def spoiled_capture(graph, why="capture was invalidated"):
    with pytest.raises(RuntimeError, match=why):  # noqa: SIM117 (the capture's end is what raises)
        with torch.cuda.graph(graph):
            yield


@pytest.fixture
def captured():
    """A graph of `out = x * 2; total += 1`, and its tensors."""
    x, total = torch.ones(3, device="cuda"), torch.zeros(1, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = x * 2
        total += 1
    return graph, x, out, total


def test_a_capture_runs_nothing(captured):
    _, _, out, total = captured
    assert out.isnan().all()
    assert total.tolist() == [0]


def test_a_replay_reads_what_is_in_memory_now(captured):
    graph, x, out, total = captured
    for value in (3.0, 5.0):
        x.fill_(value)
        graph.replay()
        assert out.tolist() == [2 * value] * 3
    assert total.tolist() == [2]


def test_each_replay_draws_anew():
    graph = torch.cuda.CUDAGraph()
    torch.cuda.manual_seed(3)
    with torch.cuda.graph(graph):
        x = torch.rand(4, device="cuda")
    drawn = []
    for _ in range(2):
        graph.replay()
        drawn.append(x.clone())
    torch.cuda.manual_seed(3)
    for actual in drawn:
        torch.testing.assert_close(actual, torch.rand(4, device="cuda"), rtol=0, atol=0)


def test_what_a_graph_reads_may_not_be_freed(captured):
    graph = torch.cuda.CUDAGraph()
    x = torch.ones(3, device="cuda")
    with torch.cuda.graph(graph):
        out = x * 2
    del x
    gc.collect()
    graph.replay()
    assert out.isnan().all()


def test_a_graphs_own_memory_stays():
    graph = torch.cuda.CUDAGraph()
    x = torch.ones(3, device="cuda")
    with torch.cuda.graph(graph):
        out = (x * 2).sin().cos()
    graph.replay()
    torch.testing.assert_close(out, (x * 2).sin().cos())


@pytest.mark.parametrize(
    "forbidden",
    [
        lambda x: x.sum().item(),
        lambda x: x.cpu(),
        lambda x: x.copy_(torch.ones(3)),
        lambda x: torch.ones(3, device="cuda") + torch.tensor([1.0, 2, 3], device="cuda"),
        lambda x: torch.cuda.synchronize(),
        lambda x: torch.cuda.current_stream().synchronize(),
        lambda x: torch.empty(3, pin_memory=True),
        lambda x: x[x > 0],
    ],
)
def test_waiting_in_a_capture_raises_and_spoils_it(forbidden):
    x = torch.ones(3, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with spoiled_capture(graph):
        x + 1
        with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
            forbidden(x)
    with pytest.raises(RuntimeError, match="not captured"):
        graph.replay()
    assert x.tolist() == [1, 1, 1]


def test_work_on_a_stream_outside_the_capture_raises():
    x, other = torch.ones(3, device="cuda"), torch.cuda.Stream()
    with spoiled_capture(torch.cuda.CUDAGraph()):
        x + 1
        with torch.cuda.stream(other), pytest.raises(RuntimeError, match="isn't part of the capture"):
            x + 2


def test_a_second_stream_is_captured_where_it_leaves_and_comes_back():
    x, other, graph = torch.ones(3, device="cuda"), torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        other.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(other):
            out = x + 2
        torch.cuda.current_stream().wait_stream(other)
    graph.replay()
    assert out.tolist() == [3, 3, 3]


def test_a_second_stream_that_does_not_come_back_spoils_the_capture():
    x, other = torch.ones(3, device="cuda"), torch.cuda.Stream()
    with spoiled_capture(torch.cuda.CUDAGraph(), "doesn't wait for"):
        other.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(other):
            x + 2


def test_a_reset_graph_gives_its_memory_back():
    before = torch.cuda.memory_allocated()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = torch.ones(1000, device="cuda") * 2
    graph.replay()
    del out
    graph.reset()
    assert torch.cuda.memory_allocated() == before
    with pytest.raises(RuntimeError):
        graph.replay()


def normalized(weight, u, v):
    return ops.spectral_norm([weight], [u], [v], update=False, backend="triton")[0]


@pytest.fixture
def plans():
    pytest.importorskip("triton")
    from fastgan.ops.spectral_norm import triton_plan

    return triton_plan


def capture_of_spectral_norm():
    operands = [torch.randn(*shape, device="cuda") for shape in ((4, 6), (4,), (6,))]
    normalized(*operands)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = normalized(*operands)
    return graph, operands, out


def test_a_captured_spectral_norm_needs_no_cache(plans):
    graph, operands, out = capture_of_spectral_norm()
    plans.plan_of.cache_clear()
    plans._table.cache_clear()
    gc.collect()
    for _ in range(2):
        operands[0].copy_(torch.randn(4, 6, device="cuda"))
        graph.replay()
        torch.testing.assert_close(out, normalized(*operands), rtol=0, atol=0)


def test_captures_of_spectral_norm_leave_nothing_behind(plans):
    capture_of_spectral_norm()
    plans._table.cache_clear()
    gc.collect()
    before, kept = torch.cuda.memory_allocated(), len(plans._captured)
    for _ in range(3):
        capture_of_spectral_norm()
    plans._table.cache_clear()
    gc.collect()
    assert torch.cuda.memory_allocated() == before
    assert len(plans._captured) == kept


def test_plans_of_captured_spectral_norms_go_with_their_parameters(plans):
    kept = len(plans._captured)
    for rows in (3, 5, 8):
        weight = torch.nn.Parameter(torch.randn(rows, 13, device="cuda"))
        vectors = torch.randn(rows, device="cuda"), torch.randn(13, device="cuda")
        normalized(weight, *vectors)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph), torch.no_grad():
            normalized(weight, *vectors)
        assert len(plans._captured) == kept + 1
        del weight, vectors, graph
        plans._table.cache_clear()
        gc.collect()


def test_captured_taps_stay_where_a_replay_reads_them(monkeypatch):
    kernels = pytest.importorskip("fastgan.ops.upfirdn2d.triton_rows")
    monkeypatch.setattr(kernels, "_MOST", len(kernels._on_device) + 1)
    x, taps = torch.randn(1, 1, 6, 6, device="cuda"), torch.tensor([1.0, 2.0, 5.0])
    expected = ops.upfirdn2d(x, taps, padding=1, backend="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.upfirdn2d(x, taps, padding=1, backend="triton")
    ops.upfirdn2d(x, torch.tensor([3.0, 2.0, 7.0]), padding=1, backend="triton")  # more taps than are kept
    gc.collect()
    graph.replay()
    torch.testing.assert_close(out, expected)


def test_new_taps_name_what_a_capture_needs():
    x = torch.randn(1, 1, 6, 6, device="cuda")
    with (
        pytest.raises(RuntimeError, match="run the step once before the capture"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        ops.upfirdn2d(x, torch.tensor([1.0, 4.0, 5.0]), padding=1, backend="triton")


def test_spectral_norm_of_new_weights_names_what_a_capture_needs(plans):
    operands = [torch.randn(*shape, device="cuda") for shape in ((3, 11), (3,), (11,))]
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="run the step once before the capture"), torch.cuda.graph(graph):
        normalized(*operands)
