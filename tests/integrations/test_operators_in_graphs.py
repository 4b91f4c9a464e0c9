"""Operators in compiled graphs write into nothing, because Inductor may read a tensor before (docs/decisions.md)."""

from __future__ import annotations

import shutil

import pytest
import torch

import fastgan
from fastgan import ops
from fastgan.ops import library
from tests.harness import needs_dynamo


def test_no_operator_of_a_graph_writes_into_its_arguments():
    fastgan.nn, ops  # noqa: B018  (both register all operators)
    assert {"norm_fwd", "bias_act_smooth_forward", "attention_bwd", "spectral_norm_fwd"} <= set(library._written)
    for name in library._written:
        schema = getattr(torch.ops.fastgan, name + "_new").default._schema
        assert not schema.is_mutable, name
        assert [str(result.type) for result in schema.returns] == ["List[Tensor]"]


@needs_dynamo
@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
def test_a_result_is_there_before_a_fused_sum_reads_it(monkeypatch):
    """The sum has one loop, its first operand two. Inductor aligns them and forgets which operator must run first."""
    monkeypatch.undo()  # poisoned memory cannot be traced
    monkeypatch.setattr("torch._inductor.config.reorder_for_locality", False)  # as in the graph of a backward
    torch.compiler.reset()

    def add(x, gate, *terms):
        gated = gate * sum(terms)
        return gated + ops.bias_act(x @ x, activation="silu")

    gate, *terms = torch.randn(16), *torch.randn(12, 16, 16)
    compiled = torch.compile(add, fullgraph=True)
    with fastgan.use_backend("cpu"):
        for _ in range(3):  # freed memory may hold the results of the last call
            x = torch.randn(16, 16)
            result = compiled(x, gate, *terms)
            torch.testing.assert_close(result, add(x, gate, *terms))
