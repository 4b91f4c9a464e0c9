"""The discriminators in the table of architectures: exact results, and the work and path that the table states."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import tables
from fastgan.bench import measure
from fastgan.bench.cases import CASES, SUITES
from fastgan.bench.cases.forms import about, setup
from fastgan.bench.flops import count_flops
from fastgan.bench.forms import FORMS

CPU = torch.device("cpu")


def small(form):
    """Return a width and the shape of a batch that are small enough for a test."""
    return 8, (4, *(min(size, 240) for size in form.shape[1:]))


@pytest.mark.parametrize("name", FORMS)
def test_each_form_has_pytorchs_gradients_in_float64(name):
    width, shape = small(FORMS[name])
    plain, ours = (make()() for make in setup(FORMS[name], width, shape, CPU, torch.float64).values())
    scale = max(float(tensor.norm()) for tensor in plain)
    assert any(tensor.any() for tensor in plain[1:])
    for wanted, actual in zip(plain, ours, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-8, atol=1e-10 * scale)


@pytest.mark.parametrize("name", FORMS)
def test_each_form_takes_the_path_and_the_work_that_are_declared(name):
    form = FORMS[name]
    width, shape = small(form)
    told = about(form, width, shape, CPU, torch.float32)
    assert told["path"].startswith("one pass") is form.one_pass
    makes = setup(form, width, shape, CPU, torch.float32)
    plain, ours = (count_flops(make()) / told["forward_flops"] for make in makes.values())
    if form.one_pass and form.shared:
        assert 3.8 < ours < 4.05
    assert ours <= plain + 0.01
    assert plain > 5.8


def test_the_forms_are_the_families_of_the_table():
    assert len(FORMS) >= 25
    assert [name.removeprefix("forms/") for name in SUITES["forms"]] == list(FORMS)
    for name in ("r3gan", "stylegan2, no stddev"):
        assert FORMS[name].one_pass


def test_the_record_of_a_form_tells_its_path_and_a_forwards_work():
    settings = {"suite": "forms", "rounds": 1, "compile": False, "copy_bandwidth": 1e9}
    measured = measure.measure(CASES["forms/mlp"], CPU, settings)
    assert measured["about"]["path"] == "one pass"
    forwards = {name: v["flops"] / measured["about"]["forward_flops"] for name, v in measured["variants"].items()}
    assert forwards["fastgan"] == pytest.approx(4, abs=0.05)
    assert forwards["torch"] > 5


def test_the_table_of_forms_is_made_from_the_record(tmp_path, monkeypatch):
    variant = {"seconds": {"median": 0.02}, "ratio": {"median": 1.0}, "flops": 600}
    fast = {"seconds": {"median": 0.01}, "ratio": {"median": 2.0}, "flops": 400}
    paths = {
        "a": "one pass",
        "b": "one pass, if the loss has the same gradient for all logits of a sample",
        "c": "general path: x",
    }
    record = {
        "suite": "forms",
        "provenance": {"device": "a CPU", "threads": 1, "torch": "2", "commit": "c", "command": "b"},
        "cases": [
            {
                "name": f"forms/{name}",
                "about": {"forward_flops": 100, "path": told},
                "variants": {"torch": variant, "fastgan": fast},
            }
            for name, told in paths.items()
        ],
    }
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    (tmp_path / "forms.json").write_text(json.dumps(record))
    page = tables.with_tables("<!-- measured forms.json forms/ -->\nold\n<!-- end -->\n")
    assert "| a | 6.00 | 4.00 | one pass | 20 | 10.0 | 2.0 |" in page
    assert "| b | 6.00 | 4.00 | one pass, if a sample's logits share a gradient | 20 | 10.0 | 2.0 |" in page
    assert "| c | 6.00 | 4.00 | general path | 20 | 10.0 | 2.0 |" in page
    assert "old" not in page
