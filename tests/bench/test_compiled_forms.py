"""Compiled forms of the timed steps: PyTorch's numbers, and the convolutions in their graphs."""

from __future__ import annotations

import dataclasses
from functools import partial

import pytest
import torch
from functorch.compile import make_boxed_func

from fastgan.bench import discriminators
from fastgan.bench.case import BASELINE, OPTIONAL, prepare
from fastgan.bench.cases import CASES
from fastgan.bench.convolutions import convolutions
from fastgan.bench.steps import batches

pytestmark = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13), reason="PyTorch's forms need 2.13"
)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def without_kernels(monkeypatch):
    """Run Inductor's graphs as they are, because compiling their kernels takes minutes."""
    monkeypatch.undo()  # poisoned memory cannot be traced
    torch.compiler.reset()
    monkeypatch.setattr(
        "torch._inductor.compile_fx.compile_fx_inner", lambda module, *_, **__: make_boxed_func(module.forward)
    )


@pytest.mark.parametrize("objective", ["d-step/r1", pytest.param("d-step/wgan-gp", marks=pytest.mark.long)])
def test_each_form_computes_the_same_and_fastgans_graphs_hold_the_fewest_convolutions(objective):
    make = partial(discriminators.critic, (3, 6), 16)
    case = dataclasses.replace(
        CASES["wgan-gp/critic64-batch4"],
        dtype=torch.float64,
        setup=lambda device, dtype: batches(make, (4, 3, 16, 16), objective, device, dtype),
    )
    variants, errors, left_out = prepare(case, CPU, optional=True)
    assert not left_out
    assert set(variants) == {BASELINE, "fastgan", *OPTIONAL}
    assert max(errors.values()) <= 1e-10
    found = {name: convolutions(name, run) for name, run in variants.items()}
    assert found["fastgan, compiled"] == found["fastgan"] < found[BASELINE] <= found["torch.compile, backward inside"]
    assert found["torch.compile, eager penalty"] is None
