"""Calls that break a rule of GPUs raise an error."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn


@pytest.fixture
def no_waiting():
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def on_device(*shape):
    return torch.randn(*shape, device="cuda")


def test_a_step_of_training_is_the_cpus():
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


def test_numbers_of_a_device_generator_are_those_of_its_seed():
    torch.cuda.manual_seed(5)
    first = torch.randn(4, device="cuda")
    torch.manual_seed(5)
    torch.testing.assert_close(torch.randn(4, device="cuda"), first, rtol=0, atol=0)
    state = torch.cuda.get_rng_state()
    drawn = torch.rand(3, device="cuda")
    torch.cuda.set_rng_state(state)
    torch.testing.assert_close(torch.rand(3, device="cuda"), drawn, rtol=0, atol=0)


@pytest.mark.parametrize(
    "mixes",
    [
        lambda: on_device(3) + torch.randn(3),
        lambda: torch.mm(torch.randn(2, 2), on_device(2, 2)),
        lambda: nn.Linear(3, 2)(on_device(1, 3)),
        lambda: torch.cat([on_device(3), torch.randn(3)]),
        lambda: torch.where(on_device(3) > 0, on_device(3), torch.zeros(3)),
    ],
)
def test_operators_take_tensors_of_one_device(mixes):
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        mixes()


def test_a_number_in_a_cpu_tensor_may_be_on_the_host(no_waiting):
    assert (on_device(3) * torch.tensor(2.0)).is_cuda


def test_a_cpu_generator_draws_nothing_on_the_device():
    with pytest.raises(RuntimeError, match="Expected a 'cuda' device type for generator but found 'cpu'"):
        torch.randn(3, device="cuda", generator=torch.Generator())


def test_memory_of_the_device_is_never_page_locked():
    with pytest.raises(RuntimeError, match="pinned"):
        torch.empty(3, device="cuda", pin_memory=True)
    with pytest.raises(RuntimeError, match="pin"):
        on_device(3).pin_memory()


def test_fresh_memory_is_not_a_number():
    assert torch.empty(5, device="cuda").isnan().all()
    assert torch.empty_strided((2, 3), (1, 2), device="cuda", dtype=torch.float16).isnan().all()
    assert (torch.empty(5, device="cuda", dtype=torch.int64) == -1).all()


@pytest.mark.parametrize(
    "waits",
    [
        lambda x: x.item(),
        lambda x: bool((x > 0).any()),
        lambda x: x.cpu(),
        lambda x: x.tolist(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: torch.ones(3).to("cuda"),
        lambda x: torch.tensor([1.0], device="cuda"),
        lambda x: x.cpu().numpy(),
        lambda x: x[torch.tensor([0])],
        lambda x: torch.equal(x, x),
    ],
)
def test_waiting_for_the_device_raises_where_it_is_forbidden(waits):
    x = on_device(1)
    waits(x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchronizing CUDA operation"):
            waits(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_waiting_warns_where_it_is_watched():
    x = on_device(1)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with pytest.warns(UserWarning, match="synchronizing CUDA operation"):
            x.item()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_copies_of_page_locked_memory_need_no_wait(no_waiting):
    host = torch.ones(3, pin_memory=True)
    assert host.is_pinned()
    device = host.to("cuda", non_blocking=True)
    torch.empty(3, pin_memory=True).copy_(device, non_blocking=True)


@pytest.mark.parametrize("recurrent", [nn.LSTM, nn.GRU])
def test_recurrent_layers_are_the_cpus(recurrent):
    layer, x = recurrent(3, 4, num_layers=2).double(), torch.randn(5, 2, 3, dtype=torch.float64)
    found = []
    for device in ("cpu", "cuda"):
        layer, inputs = layer.to(device), x.to(device).requires_grad_()
        value = layer(inputs)[0]
        (grad,) = torch.autograd.grad(value.square().sum(), inputs, create_graph=True)
        found.append([value, grad, *torch.autograd.grad(grad.square().sum(), list(layer.parameters()))])
    for a, e in zip(*found, strict=True):
        torch.testing.assert_close(a.cpu(), e.cpu())


def test_a_process_ends_well_with_a_graph_that_was_never_reset(tmp_path):
    pytest.importorskip("triton")
    script = tmp_path / "script.py"  # Triton reads the source
    script.write_text("""
import torch, triton, triton.language as tl
@triton.jit
def double(x):
    tl.store(x, 2 * tl.load(x))
x, graph = torch.ones(1, device="cuda"), torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    double[(1,)](x)
graph.replay()
assert x.item() == 2
""")
    result = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_devices_that_are_not_there_are_refused():
    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        torch.randn(3, device="cuda:7")


def test_memory_is_counted():
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    x = torch.zeros(1000, device="cuda")
    assert torch.cuda.memory_allocated() - before == 4000
    del x
    assert torch.cuda.memory_allocated() == before
    assert torch.cuda.max_memory_allocated() >= before + 4000


def test_backward_runs_on_a_thread_of_the_device():
    import threading

    seen = []
    x = on_device(3).requires_grad_()
    y = x * 2
    y.register_hook(lambda grad: seen.append(threading.get_ident()))
    y.sum().backward()
    assert seen
    assert seen[0] != threading.get_ident()


def test_a_fork_after_the_first_use_cannot_use_the_device():
    on_device(1)
    child = os.fork()
    if not child:
        try:
            torch.ones(1, device="cuda")
        except RuntimeError as error:
            os._exit(0 if "forked subprocess" in str(error) else 2)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_it_must_be_there_before_pytorch():
    code = "import torch, simulated_gpu; simulated_gpu.install()"
    environment = {**os.environ, "SIMULATED_GPU": "0"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.returncode
    assert "before PyTorch is imported" in result.stderr


def test_a_library_that_cannot_be_built_says_why(tmp_path):
    code = "from simulated_gpu.build import library; library()"
    environment = {**os.environ, "SIMULATED_GPU": "0", "SIMULATED_GPU_BUILD": str(tmp_path), "CXX": "no-such-compiler"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "there is no C++ compiler 'no-such-compiler'" in result.stderr


def test_sources_that_do_not_compile_are_a_failure_and_no_reason_to_skip(tmp_path):
    runner = Path(__file__).with_name("run.py")
    environment = {**os.environ, "SIMULATED_GPU": "0", "SIMULATED_GPU_BUILD": str(tmp_path), "CXX": "false"}
    result = subprocess.run([sys.executable, runner, "deferred"], env=environment, capture_output=True, text=True)
    assert result.returncode == 1
    assert "the compiler failed" in result.stderr
