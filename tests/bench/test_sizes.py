"""The cases in which fastgan must not be slower: all variants agree, and the cases cover the intended sizes."""

from __future__ import annotations

import pytest
import torch

from fastgan.bench import measure, timing
from fastgan.bench.case import BASELINE, prepare
from fastgan.bench.cases import CASES, SUITES

pytestmark = pytest.mark.small  # timed as a user has them


@pytest.mark.parametrize("name", [name for name in SUITES["sizes"] if "256" not in name])
def test_fastgans_penalty_or_step_gives_the_gradients_of_pytorchs(name):
    runs, errors, left_out = prepare(CASES[name], torch.device("cpu"))
    assert list(runs) == [BASELINE, "fastgan"]
    assert not left_out
    assert errors["fastgan"] <= CASES[name].tolerance


def test_each_discriminator_has_penalties_and_a_whole_step_and_some_are_functions():
    for objective in ("wgan-gp", "r1", "d-step/r1"):
        names = [name for name in SUITES["sizes"] if name.startswith(f"sizes/{objective}/")]
        assert len(names) >= 30
        assert sum(name.endswith("/function") for name in names) >= 6


@pytest.mark.parametrize(("suite", "builds", "parts"), [("sizes", 4, 10), ("ops", 1, 1)])
def test_close_times_are_measured_in_several_builds_and_short_samples(suite, builds, parts, monkeypatch):
    asked = []

    def in_turns(variants, timer, rounds, seconds, parts):
        asked.append(parts)
        return {name: [1.0] * rounds for name in variants}

    monkeypatch.setattr(timing, "in_turns", in_turns)
    results = {"suite": suite, "rounds": 2, "compile": False, "copy_bandwidth": 1e9}
    found = measure.measure(CASES["sizes/r1/conv4-batch4"], torch.device("cpu"), results)
    assert asked == [parts] * builds
    assert found["variants"]["fastgan"]["ratio_of_medians"] == 1.0
