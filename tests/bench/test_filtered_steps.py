"""Filtered discriminators: fastgan's functions compute the same step as PyTorch's with less work."""

from __future__ import annotations

import dataclasses
from functools import partial

import pytest
import torch

import fastgan
from fastgan.bench import filtered
from fastgan.bench.case import prepare
from fastgan.bench.cases import CASES, filtered_steps
from tests.ops.one_pass_problem import work

NAMES = [name for name in CASES if "/filtered-" in name]


@pytest.mark.parametrize(("name", "make"), [(NAMES[0], filtered.stylegan2), (NAMES[2], filtered.r3gan)])
def test_both_variants_take_the_same_step(name, make):
    case = CASES[name]
    objective = name.rpartition("/")[0]
    small = partial(filtered_steps.variants, lambda functions: make(functions, 16, 8, 16), (4, 3, 16, 16), objective)
    variants, errors, left_out = prepare(dataclasses.replace(case, setup=small), torch.device("cpu"))
    assert set(variants) == {"torch", "fastgan"}
    assert not left_out
    assert 0 < errors["fastgan"] <= case.tolerance


def test_each_family_has_two_sizes():
    assert len(NAMES) == 4


@pytest.mark.parametrize("make", [filtered.stylegan2, filtered.r3gan])
def test_the_discriminators_are_one_pass_on_fastgans_functions(make):
    model, x = make(filtered.OURS, 16, 8, 16), torch.randn(4, 3, 16, 16)
    assert fastgan.explain_penalty(model, x) == "one pass"

    def step():
        logits, penalty = fastgan.logits_and_penalty(model, x, kind="r1")
        (logits.mean() + penalty).backward()

    assert work(step) <= 4.1 * work(lambda: model(x))
