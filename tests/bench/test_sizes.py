"""The cases in which fastgan must not be slower: all variants agree, and the cases cover the intended sizes."""

from __future__ import annotations

import pytest
import torch

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
