"""The size from which fastgan's functions are used on a GPU. tests/simulated_gpu has the tests that need a device."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fastgan.ops.gradient_penalty import overhead
from fastgan.ops.gradient_penalty.overhead import HOST_SECONDS, rate, threshold
from fastgan.ops.gradient_penalty.size import Cost
from fastgan.ops.twice_differentiable import Reroute

DEVICE = torch.device("cuda", 0)
H200, CONSUMER = (9, 0, 132), (8, 9, 128)


@pytest.fixture
def gpu(monkeypatch):
    def become(major, minor, multiprocessors):
        properties = SimpleNamespace(major=major, minor=minor, multi_processor_count=multiprocessors)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)

    monkeypatch.setattr(overhead, "_allows_tf32", lambda: True)
    return become


def image(dtype=torch.float32):
    return SimpleNamespace(is_cuda=True, device=DEVICE, dtype=dtype)


def test_rates_are_a_quarter_of_the_published_peaks(gpu):
    for properties, tf32, half in (
        (H200, 494e12, 989e12),
        ((8, 0, 108), 156e12, 312e12),
        ((10, 0, 148), 1.1e15, 2.2e15),
    ):
        gpu(*properties)
        assert rate(DEVICE, torch.float32) == pytest.approx(tf32 / 4, rel=0.3)
        assert rate(DEVICE, torch.bfloat16) == pytest.approx(half / 4, rel=0.3)
    gpu(13, 7, 100)
    assert rate(DEVICE, torch.float32) > 0, "GPUs that are not listed have a rate, too"


def test_the_precision_decides(gpu, monkeypatch):
    gpu(*H200)
    each = [rate(DEVICE, dtype) for dtype in (torch.float64, torch.float32, torch.float16)]
    assert each == sorted(each)
    monkeypatch.setattr(overhead, "_allows_tf32", lambda: False)
    assert rate(DEVICE, torch.float64) < rate(DEVICE, torch.float32) < each[1]


def test_fastgan_is_used_if_pytorchs_work_takes_longer_than_fastgans_calls(gpu):
    for properties in (H200, CONSUMER):
        gpu(*properties)
        limit = threshold(image())
        for layers in (1, 5, 50):
            seconds = HOST_SECONDS * layers  # the host's time, if PyTorch's six forwards keep the device busy as long
            equal = int(seconds * rate(DEVICE, torch.float32) / 12)
            assert not Cost(equal, layers).reaches(limit)
            assert Cost(equal + limit.least + layers, layers).reaches(limit)


def test_a_faster_gpu_needs_a_larger_discriminator(gpu):
    gpu(*CONSUMER)
    slower = threshold(image())
    gpu(*H200)
    assert threshold(image()) > slower
    assert threshold(image(torch.bfloat16)) > threshold(image())
    assert threshold(torch.randn(2)) < slower, "a CPU's calls and work take turns, and it works more slowly"


def test_counting_subtracts_the_cost_of_a_call_on_this_device():
    conv = nn.Conv2d(8, 8, 1)  # 64 multiplications at each of 32 positions
    x = torch.randn(2, 8, 4, 4)
    for call, left in ((0, 5000 - 2048), (2000, 5000 - 48), (5000, 5000 + 2952)):
        mode = Reroute(after=5000, call=call)
        with mode:
            conv(x)
        assert mode.left == left
