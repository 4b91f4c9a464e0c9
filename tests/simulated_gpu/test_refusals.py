"""Calls that the simulation cannot represent raise an error that names the limitation."""

from __future__ import annotations

import importlib
import importlib.util
import sys

import pytest
import torch
import torch.distributed
from simulated_gpu import refusals
from simulated_gpu.refusals import NotSimulated
from torch import nn


def test_native_kernels_are_not_imported():
    with pytest.raises(ImportError, match="no native CUDA kernels"):
        importlib.import_module("fastgan._native_cuda")


def test_hidden_modules_are_as_if_not_installed(monkeypatch):
    monkeypatch.setenv("SIMULATED_GPU_HIDES", "wave,this")
    for name in ("wave", "this"):
        monkeypatch.setitem(sys.modules, name, None)  # restored after the test
        del sys.modules[name]
        assert importlib.util.find_spec(name) is not None
    refusals.hide()
    for name in ("wave", "this"):
        assert importlib.util.find_spec(name) is None
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module(name)


def test_times_are_not_told(monkeypatch):
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    monkeypatch.delenv("SIMULATED_GPU_HOST_TIMES", raising=False)
    start.record()
    end.record()
    with pytest.raises(NotSimulated, match="no timing"):
        start.elapsed_time(end)
    monkeypatch.setenv("SIMULATED_GPU_HOST_TIMES", "1")
    assert start.elapsed_time(end) >= 0


def test_nothing_is_sent_by_nccl():
    with pytest.raises(NotSimulated, match="no NCCL"):
        torch.distributed.init_process_group("nccl", init_method="tcp://127.0.0.1:1", rank=0, world_size=1)
    with pytest.raises(NotSimulated, match="no NCCL"):
        nn.parallel.DistributedDataParallel(nn.Linear(2, 2).cuda())


def test_compiled_kernels_are_not_run():
    compiled = torch.compile(lambda x: x.sin() + 1)
    with pytest.raises(Exception, match="no compiled Triton kernels"):
        compiled(torch.ones(3, device="cuda"))


def test_the_device_says_what_it_is():
    assert "Simulated" in torch.cuda.get_device_name()
