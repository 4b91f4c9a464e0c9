"""The suite that measures the host's time: small steps as users have them, and with fastgan's own functions."""

from __future__ import annotations

import pytest
import torch

import fastgan
from fastgan.bench.case import BASELINE, prepare
from fastgan.bench.cases import CASES, SUITES
from fastgan.bench.cases.host import one_pixel
from fastgan.bench.host import force_fastgan, lowest_times, parts, per_layer
from fastgan.bench.steps import batches
from fastgan.ops.conv import autograd

pytestmark = pytest.mark.small  # as for users: small discriminators are left to PyTorch
CPU = torch.device("cpu")


@pytest.mark.parametrize("name", SUITES["host"])
def test_all_variants_agree_and_one_calls_fastgans_functions(name, monkeypatch):
    called = []
    original = autograd._forward
    monkeypatch.setattr(autograd, "_forward", lambda *args: called.append(1) or original(*args))
    variants, errors, _ = prepare(CASES[name], CPU)
    called.clear()
    variants[BASELINE]()
    assert not called
    variants["fastgan"]()
    assert not called
    variants["fastgan, own functions"]()
    assert called
    assert max(errors["fastgan"], errors["fastgan, own functions"]) <= CASES[name].tolerance


def test_without_the_suites_wrapper_the_step_is_left_to_pytorch(monkeypatch):
    called = []
    original = autograd._forward
    monkeypatch.setattr(autograd, "_forward", lambda *args: called.append(1) or original(*args))
    makes = batches(one_pixel(2), (2, 3, 1, 1), "r1", CPU, torch.float32)
    makes["fastgan"]()()
    assert not called
    force_fastgan(makes)["fastgan"]()()
    assert called


def test_images_of_one_pixel_take_one_pass():
    with fastgan.use_backend("cpu"):
        assert fastgan.explain_penalty(one_pixel(4)(), torch.randn(2, 3, 1, 1)) == "one pass"


def test_the_cost_of_a_layer_is_the_difference_of_two_depths(monkeypatch):
    seen = []

    def times(calls, rounds, repeats):
        seen.extend(calls)
        return {(name, depth): {BASELINE: 10, "fastgan": 20}[name] * depth + 7 for name, depth in calls}

    monkeypatch.setattr("fastgan.bench.host.lowest_times", times)
    found = per_layer(one_pixel, (1, 3), (2, 3, 1, 1), "r1", CPU, torch.float32)
    assert found == {BASELINE: 10, "fastgan": 20}
    assert len(seen) == 4


def test_the_lowest_time_of_each_call_is_kept(monkeypatch):
    clock = iter([0, 3e-6, 10, 10 + 8e-6, 20, 20 + 5e-6, 30, 30 + 6e-6])
    monkeypatch.setattr("fastgan.bench.host.time.perf_counter", lambda: next(clock))
    found = lowest_times({"a": lambda: None, "b": lambda: None}, rounds=2, repeats=1)
    assert {name: round(value, 3) for name, value in found.items()} == {"a": 3, "b": 6}


def test_every_part_is_measured():
    found = parts(CPU, torch.float32, rounds=2)
    assert {"a mode", "rerouting", "tracing", "a Function", "its context", "the engine's question"} <= set(found)
    assert 0 < found["an activation, PyTorch"] < found["a convolution, PyTorch"]
