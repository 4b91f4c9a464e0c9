"""Inputs of normalizations: the strides, shapes and types that PyTorch supports, and errors for all others."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import fastgan
from fastgan import ops
from tests.harness import BACKENDS, assert_close, device_of, relative_error
from tests.hypothesis_if_there import given, settings, st
from tests.ops.norm_problem import AFFINE, apply, penalty_gradients, problem_of, values_and_gradients


@pytest.mark.parametrize("backend", BACKENDS[1:3])  # PyTorch's group_norm of channels_last does lose them
@pytest.mark.parametrize(
    "case", ["layer, long rows", "group, 2-D", "instance, long channels", "batch, 2-D", "group, channels_last"]
)
def test_a_mean_far_from_zero_costs_no_digits(backend, case):
    problem = problem_of(case, (False, False), torch.float32, device_of(backend), offset=100.0)
    exact = problem.to(torch.float64)("reference")
    assert relative_error(problem(backend), exact) <= 1e-5


@pytest.mark.parametrize("backend", BACKENDS[1:3])
@pytest.mark.parametrize("case", ["layer, images", "group, 2-D", "batch, 2-D"])
def test_the_memory_format_is_kept_and_strides_do_not_matter(backend, case):
    problem = problem_of(case, dtype=torch.float32, device=device_of(backend)).to(torch.float32)
    forms = {
        "contiguous": problem.x,
        "channels_last": problem.x.contiguous(memory_format=torch.channels_last),
        "transposed": problem.x.mT.contiguous().mT,
        "sliced": torch.cat([problem.x, problem.x], 1)[:, : problem.x.shape[1]],
    }
    results = {}
    for name, x in forms.items():
        x = x.detach().requires_grad_()
        y = problem(backend, x)
        assert y.is_contiguous(
            memory_format=torch.channels_last if name == "channels_last" else torch.contiguous_format
        )
        (grad,) = torch.autograd.grad(y, x, problem.scale.mT.contiguous().mT, create_graph=True)
        results[name] = [y, grad, *torch.autograd.grad(grad.square().sum(), (x, problem.weight))]
    for name, result in results.items():
        for order, a, b in zip((0, 1, 2, 2), result, results["contiguous"], strict=True):
            if name == "channels_last":  # sums are taken in the order of memory
                assert_close(a, b.double(), order=order)
            else:
                assert torch.equal(a, b), name


@pytest.mark.parametrize(
    "function", [lambda x: F.layer_norm(x, x.shape[1:]), F.instance_norm], ids=["layer", "instance"]
)
def test_unchanged_code_gets_the_strides_that_pytorch_gives(function):
    x = torch.randn(4, 16, 16, 16).to(memory_format=torch.channels_last).requires_grad_()
    with fastgan.twice_differentiable():
        y = function(x)
    expected = function(x)
    assert y.stride() == expected.stride()
    torch.testing.assert_close(y, expected)


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 5),
    groups=st.integers(1, 4),
    channels=st.integers(1, 5),
    spatial=st.lists(st.integers(1, 40), max_size=2),
    affine=st.sampled_from(list(AFFINE.values())),
)
def test_any_shape_matches_on_the_cpu(batch, groups, channels, spatial, affine):
    shape = (batch, groups * channels, *spatial)
    if torch.Size(shape).numel() // groups == 1:
        return
    problem = problem_of(("group_norm", shape, groups), affine)
    for compute in (values_and_gradients, penalty_gradients):
        pairs = zip(
            compute(problem.to(torch.float64), "cpu"), compute(problem.to(torch.float64), "reference"), strict=True
        )
        for (_, actual), (_, expected) in pairs:
            torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("op", ["layer_norm", "group_norm", "instance_norm"])
def test_a_float32_weight_goes_with_an_input_in_half_precision(op, dtype):
    case = {"layer_norm": "layer, images", "group_norm": "group, 2-D", "instance_norm": "instance, 2-D"}[op]
    problem = problem_of(case, dtype=dtype).to(dtype)
    problem.weight, problem.bias = (t.detach().float().requires_grad_() for t in (problem.weight, problem.bias))
    actual = values_and_gradients(problem, "cpu")
    exact = values_and_gradients(problem.to(torch.float64), "reference")
    assert [a.dtype for _, a in actual] == [dtype, dtype, torch.float32, torch.float32]
    for (order, a), (_, e), (_, o) in zip(actual, exact, values_and_gradients(problem, "reference"), strict=True):
        assert_close(a, e, order=order, reference=o)


@pytest.mark.parametrize("case", ["layer, images", "group, 2-D", "instance, 2-D"])
@pytest.mark.parametrize("backend", BACKENDS[1:3])
def test_a_bias_alone_is_a_bias_with_a_weight_of_one(backend, case):
    alone = problem_of(case, (False, True), torch.float64, device_of(backend)).to(torch.float64)
    with_one = alone.to(torch.float64)
    with_one.weight = torch.ones_like(alone.bias)
    for problem in (alone, with_one):
        problem.results = [
            *torch.autograd.grad(
                torch.tanh(problem(backend)).square().sum(), (problem.x, problem.bias), create_graph=True
            )
        ]
        penalty = sum(g.square().sum() for g in problem.results)
        problem.results += torch.autograd.grad(penalty, (problem.x, problem.bias))
    for a, e in zip(alone.results, with_one.results, strict=True):
        assert_close(a, e, order=2)


@pytest.mark.parametrize("op", ["layer_norm", "group_norm"])  # PyTorch's instance_norm raises an IndexError
def test_an_empty_batch_gives_what_pytorch_gives(op):
    x = torch.randn(0, 4, 5, requires_grad=True)
    weight = torch.randn((5,) if op == "layer_norm" else (4,), requires_grad=True)
    argument = (5,) if op == "layer_norm" else 2
    out = apply(op, argument, x, weight, None, "cpu")
    assert out.shape == x.shape
    grads = torch.autograd.grad(out.sum(), (x, weight))
    assert torch.equal(grads[1], torch.zeros_like(weight))


def test_instance_norm_with_running_statistics_is_pytorchs():
    x = torch.randn(3, 4, 5, 6)
    for use_input_stats in (True, False):
        mine, theirs = ([torch.ones(4), torch.full((4,), 2.0)] for _ in range(2))
        actual = ops.instance_norm(x, *mine, use_input_stats=use_input_stats, momentum=0.3)
        expected = F.instance_norm(x, *theirs, use_input_stats=use_input_stats, momentum=0.3)
        assert torch.equal(actual, expected)
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
        assert torch.equal(mine[0], torch.ones(4)) != use_input_stats


def test_cpu_autocast_changes_nothing_as_in_pytorch():
    for dtype in (torch.float32, torch.bfloat16):
        problem = problem_of("group, 2-D", dtype=dtype)
        plain = problem("cpu")
        with torch.autocast("cpu", torch.bfloat16):
            assert problem("reference").dtype == dtype
            assert torch.equal(problem("cpu"), plain)


X, W = torch.randn(3, 4, 5), torch.randn(4)
BAD = {
    "a list": (lambda: ops.layer_norm(X.tolist(), (5,)), TypeError, "input must be a tensor, got list"),
    "integers": (lambda: ops.group_norm(X.long(), 2), TypeError, "input must be float.* torch.int64"),
    "complex": (lambda: ops.instance_norm(X.cfloat()), TypeError, "input must be float.* torch.complex64"),
    "normalized_shape": (lambda: ops.layer_norm(X, (4,)), ValueError, r"normalized_shape .* got \(4,\)"),
    "no normalized_shape": (lambda: ops.layer_norm(X, ()), ValueError, r"normalized_shape .* got \(\)"),
    "shape of weight": (lambda: ops.layer_norm(X, (5,), W), ValueError, r"weight must have shape \(5,\).*\(4,\)"),
    "shape of bias": (lambda: ops.group_norm(X, 2, W, W[:3]), ValueError, r"bias must have shape \(4,\).*\(3,\)"),
    "dtype of weight": (lambda: ops.group_norm(X, 2, W.double()), TypeError, "weight must have the input's dtype"),
    "half weight": (lambda: ops.group_norm(X, 2, W.half()), TypeError, "weight must have the input's dtype"),
    "device of bias": (lambda: ops.group_norm(X, 2, W, W.to("meta")), ValueError, "bias must be on .* meta"),
    "weight a list": (lambda: ops.instance_norm(X, weight=[1.0]), TypeError, "weight must be a tensor or None"),
    "num_groups": (lambda: ops.group_norm(X, 3), ValueError, "num_groups must divide the input's 4 channels, got 3"),
    "no groups": (lambda: ops.group_norm(X, 0), ValueError, "num_groups must divide"),
    "one dimension": (lambda: ops.group_norm(W, 2), ValueError, r"input must be \(N, C, \*\)"),
    "one value a group": (lambda: ops.group_norm(X[:1, :, 0], 4), ValueError, "more than one value per group"),
    "one value a channel": (lambda: ops.instance_norm(X[:, :, :1]), ValueError, "more than one value per channel"),
    "backend": (lambda: ops.layer_norm(X, (5,), backend="cudnn"), ValueError, "backend must be one of"),
    "no such backend": (
        lambda: ops.layer_norm(X, (5,), backend="cuda"),
        fastgan.BackendUnavailable,
        "layer_norm has no cuda",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input_raises_a_message_that_names_it(call, error, message):
    with pytest.raises(error, match=message):
        call()
