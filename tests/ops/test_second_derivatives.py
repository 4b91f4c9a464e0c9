"""Every module and function of torch.nn in a discriminator: PyTorch's gradient, or an error with the layer's name."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from tests.harness import VERSION
from tools import second_derivatives as sweep

CASES = sweep.cases()
LACKING = {"MultiMarginLoss", "MultiLabelMarginLoss", "CTCLoss", "CrossMapLRN2d"}
if VERSION < (2, 12):
    LACKING.add("F.grid_sample (bicubic)")


def test_no_module_of_torch_is_left_out():
    public = {name for name in dir(nn) if isinstance(getattr(nn, name), type) and name[0].isupper()}
    assert public - CASES.keys() <= sweep.LEFT_OUT


def test_no_function_of_torch_is_left_out():
    assert sweep.public_functions() - sweep.called_functions() <= sweep.LEFT_OUT_FUNCTIONS


def test_a_new_function_of_torch_is_missed(monkeypatch):
    monkeypatch.setattr(functional, "a_new_loss", lambda x: x, raising=False)
    assert "a_new_loss" in sweep.public_functions() - sweep.called_functions()


@pytest.mark.parametrize("name", CASES)
def test_a_penalty_takes_it_or_names_it(name):
    assert (sweep.classify(name, *CASES[name]) == sweep.REFUSED) == (name in LACKING)


@pytest.mark.skipif(not torch.__version__.startswith("2.13"), reason="the page is of torch 2.13")
def test_the_page_has_the_table():
    assert sweep.table() in sweep.PAGE.read_text()
