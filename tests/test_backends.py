from __future__ import annotations

import logging
import threading

import pytest
import torch
from torch import nn

import fastgan
from fastgan import backends, ops

CPU = torch.device("cpu")


def operands():
    return [torch.randn(3, 2)], [torch.randn(3)], [torch.randn(2)]


def test_the_fastest_backend_that_can_run_is_chosen():
    assert backends.select("spectral_norm", CPU, torch.float32) == "cpu"


def test_use_backend_forces_a_backend_and_restores_the_one_before():
    with fastgan.use_backend("reference"):
        assert backends.select("spectral_norm", CPU, torch.float32) == "reference"
        with fastgan.use_backend("cpu"):
            assert backends.select("spectral_norm", CPU, torch.float32) == "cpu"
        assert backends.select("spectral_norm", CPU, torch.float32) == "reference"
    assert backends.select("spectral_norm", CPU, torch.float32) == "cpu"


def test_an_exception_inside_use_backend_leaves_nothing_forced():
    with pytest.raises(KeyError), fastgan.use_backend("reference"):
        raise KeyError
    assert backends.select("spectral_norm", CPU, torch.float32) == "cpu"


def test_use_backend_does_not_reach_other_threads():
    seen = []
    with fastgan.use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(backends.select("spectral_norm", CPU, torch.float32)))
        thread.start()
        thread.join()
    assert seen == ["cpu"]


def test_the_argument_wins_over_the_context():
    with fastgan.use_backend("reference"):
        assert backends.select("spectral_norm", CPU, torch.float32, "cpu") == "cpu"


@pytest.mark.parametrize("name", ["numpy", "", "CPU"])
def test_an_unknown_backend_is_refused_by_name(name):
    with pytest.raises(ValueError, match="backend must be one of"), fastgan.use_backend(name):
        pass


def test_a_forced_backend_that_cannot_run_raises_with_the_reason():
    with fastgan.use_backend("cuda"), pytest.raises(fastgan.BackendUnavailable, match="NVIDIA GPU"):
        ops.spectral_norm(*operands())


def test_backward_follows_the_backend_of_its_forward(monkeypatch):
    from fastgan.ops.spectral_norm import native_kernels

    calls = []
    original = native_kernels.Native.backward
    monkeypatch.setattr(native_kernels.Native, "backward", lambda self, *a: (calls.append("cpu"), original(self, *a)))
    weights, us, vs = operands()
    weights[0].requires_grad_()
    with fastgan.use_backend("cpu"):
        (out,) = ops.spectral_norm(weights, us, vs)
    with fastgan.use_backend("reference"):
        out.sum().backward()
    assert calls == ["cpu"]


@pytest.fixture
def without_native(monkeypatch):
    """As on a machine with no compiler."""
    reason = "fastgan._native is not available: no C++ compiler"
    original = backends._import
    missing = lambda name: (None, reason) if name == "fastgan._native" else original(name)  # noqa: E731
    monkeypatch.setattr(backends, "_import", missing)
    for cached in (backends._choose, backends._has_kernel):
        cached.cache_clear()
    yield
    for cached in (backends._choose, backends._has_kernel):
        cached.cache_clear()


def test_without_kernels_the_reference_runs_and_says_so_once(without_native, caplog):
    with caplog.at_level(logging.WARNING, "fastgan"):
        for _ in range(2):
            ops.spectral_norm(*operands())
    assert len(caplog.records) == 1
    assert "falls back to pure PyTorch" in caplog.text
    assert "no C++ compiler" in caplog.text


def test_without_kernels_relu_and_leaky_relu_allow_one_pass(without_native):
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(1)
    )
    x = torch.randn(32, 3, 64, 64)  # more elements than the path for small inputs takes
    net(x)
    assert fastgan.explain_penalty(net, x) == "one pass"


@pytest.mark.parametrize(("count", "says"), [(1, "1 thread,"), (2, "2 threads,")])
def test_info_counts_threads(monkeypatch, count, says):
    monkeypatch.setattr(torch, "get_num_threads", lambda: count)
    assert f"CPU      {says}" in fastgan.info()


def test_info_says_what_runs_and_why_the_rest_does_not(without_native, caplog):
    with caplog.at_level(logging.WARNING, "fastgan"):
        text = fastgan.info()
    assert not caplog.records  # the table says it
    assert f"torch {torch.__version__}" in text
    rows = {tuple(line.split()[:2]): line for line in text.splitlines() if line.startswith("  ")}
    for op, declared in backends._ops.items():
        if len(declared.implementations) == 1:
            continue  # part of another op
        assert "chosen" in rows[op, "reference"]
        missing = "no C++ compiler" if "cpu" in declared.implementations else f"{op} has no cpu implementation"
        assert missing in rows[op, "cpu"]
        missing = "NVIDIA GPU" if "cuda" in declared.implementations else f"{op} has no cuda implementation"
        assert missing in rows[op, "cuda"]
