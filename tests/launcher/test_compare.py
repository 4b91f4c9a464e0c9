"""What ``fastgan run --compare`` records in each process, and what it prints."""

from __future__ import annotations

import json
import math
import os

import pytest
import torch

from fastgan import drop_in
from fastgan.launcher import compare, session
from fastgan.launcher.command import Settings, parse
from fastgan.launcher.learning import HOOKED
from tests.launcher.training import data, models, penalty


class Stop(Exception):
    pass


@pytest.fixture
def record(tmp_path, monkeypatch):
    """Run a function that trains, in one role of a comparison, and return what it recorded."""

    def stop(status):
        raise Stop

    monkeypatch.setattr(os, "_exit", stop)
    monkeypatch.setattr(drop_in, "patch_torch_utils", lambda: None)

    def run(role, train, steps=3):
        file = str(tmp_path / role)
        monkeypatch.setenv(compare.VARIABLE, f'{{"role": "{role}", "steps": {steps}, "file": "{file}", "threads": 1}}')
        recorder = compare.recorder_of_this_process()
        one = session.begin(Settings())
        one.recorder, one.way = recorder, recorder.way
        try:
            train()
        except Stop:
            pass
        else:
            recorder.end(one)
        finally:
            session.end()
        return torch.load(file)

    return run


def every_fourth_step(steps=60):
    d, _ = models()
    optimizer = torch.optim.Adam(d.parameters(), 1e-3)
    for number in range(steps):
        loss = d(data()[0]).mean()
        if number % 4 == 0:
            loss = loss + penalty(d, data()[0].requires_grad_())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def optimizers_one_after_the_other():
    d, g = models()
    optimizers = [torch.optim.Adam(one.parameters(), 1e-3) for one in (d, g)]
    for _ in range(20):
        real, z = data()
        (d(g(z)).mean() + penalty(d, real.requires_grad_())).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def accumulation():
    d, _ = models()
    optimizer = torch.optim.Adam(d.parameters(), 1e-3)
    for _ in range(20):
        optimizer.zero_grad()
        for _ in range(2):
            penalty(d, data()[0].requires_grad_()).backward()
        optimizer.step()


def without_an_optimizer():
    d, _ = models()
    parameters = [d.first.weight, d.second.weight]
    for _ in range(20):
        grads = torch.autograd.grad(penalty(d, data()[0].requires_grad_()), parameters)
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.data.sub_(grad, alpha=1e-3)


SCRIPTS = [every_fourth_step, optimizers_one_after_the_other, accumulation, without_an_optimizer]


@pytest.mark.parametrize("train", SCRIPTS)
def test_both_ways_take_the_same_steps(train, record):
    plain, fused = record("PyTorch", train), record("fastgan", train)
    assert plain["steps"] == fused["steps"] >= 3  # a step of accumulation ends with the optimizer
    assert len(plain["losses"]) == len(fused["losses"]) >= 3
    assert fused["losses"] == pytest.approx(plain["losses"], rel=1e-4, abs=1e-5)
    for actual, wanted in zip(fused["parameters"], plain["parameters"], strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5)


def test_one_step_of_a_comparison_is_fastgans(record):
    record("fastgan", every_fourth_step, steps=1)
    assert record("fastgan", lambda: every_fourth_step(5))["steps"] == 0  # PyTorch computes the first two
    assert record("turns", every_fourth_step, steps=1)["times"][0][2] is not None


def hooked():
    d, _ = models()
    d.register_forward_hook(lambda *_: None)
    optimizer = torch.optim.SGD(d.parameters(), 1e-3)
    for _ in range(100):
        penalty(d, data()[0].requires_grad_()).backward()
        optimizer.step()


def without_a_penalty():
    d, _ = models()
    optimizer = torch.optim.SGD(d.parameters(), 1e-3)
    for _ in range(100):
        d(data()[0]).mean().backward()
        optimizer.step()


def test_a_process_that_waits_in_vain_stops(record, monkeypatch):
    monkeypatch.setattr(compare, "LONGEST_WAIT_AFTER_REFUSAL", 5)
    monkeypatch.setattr(compare, "LONGEST_WAIT", 9)
    one = record("PyTorch", hooked)
    assert one["waited"] == 5
    first, second = report(PyTorch=one)
    assert first == "fastgan: nothing to compare, no penalty was rerouted"
    assert HOOKED in second
    one = record("PyTorch", without_a_penalty)
    assert one["waited"] == 9
    assert report(PyTorch=one) == ["fastgan: nothing to compare, there was no penalty in 9 optimizer steps"]


FOUND = dict(
    losses=[1.0, 2.0], parameters=[torch.ones(2)], steps=2, times=[], seen=True, waited=2, refused={}, memory=1
)


def report(**roles):
    return compare.report(roles, 4, 1, 2)


def test_the_report_names_what_is_missing():
    found = dict.fromkeys(compare.ROLES, FOUND)
    times = [("D at loss.py:3", 0.02, 0.01), ("G at loss.py:9", None, 0.01), ("G at loss.py:7", 0.01, 0.02)]
    lines = report(**{**found, "turns": {**FOUND, "times": times}})
    assert [line.split(",")[0] for line in lines[1:3]] == [
        "  time per step that begins with D at loss.py:3",
        "  time per step that begins with G at loss.py:7",
    ]
    first, _, losses, parameters = report(**found)
    assert first.startswith("fastgan: 2 steps with a penalty (the script ended before 4)")
    assert "losses: fastgan 0;" in losses
    assert "parameters: fastgan 0;" in parameters
    (nothing,) = report(PyTorch={**FOUND, "steps": 0})
    assert "the script ended too early" in nothing
    one = {**FOUND, "losses": [1.0, math.nan, 3.0], "refused": {"D at train.py:3": "reason"}}
    _, _, losses, number, infinite, _, refused = report(**{**found, "PyTorch": one})
    assert "losses: fastgan inf;" in losses
    assert number == "  number of losses: PyTorch 3, fastgan 2"
    assert "NaN" in infinite
    assert refused == "  not rerouted: D at train.py:3: reason"
    without = {role: {**FOUND, "losses": []} for role in compare.ROLES}
    assert not any("losses" in line for line in report(**without))


def test_each_process_reads_a_redirected_input_from_where_it_began(tmp_path, monkeypatch, capsys):
    read = []

    def run(arguments, variables, errors):
        read.append(os.read(0, 100))
        torch.save(FOUND, json.loads(variables[compare.VARIABLE])["file"])
        return 0

    monkeypatch.setattr(compare, "_run", run)
    (tmp_path / "input").write_text("first\nsecond\n")
    own = os.dup(0)
    with (tmp_path / "input").open("rb", buffering=0) as file:
        os.dup2(file.fileno(), 0)
        try:
            os.read(0, 6)
            assert compare.compare(parse(["--compare", "2", "train.py"])) == 0
        finally:
            os.dup2(own, 0)
            os.close(own)
    assert read == [b"second\n"] * 4
    assert "2 steps with a penalty, in PyTorch" in capsys.readouterr().out
