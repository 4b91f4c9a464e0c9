"""upfirdn2d: its filters, bad input, the one pass, torch.compile, tracers and modes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastgan
from fastgan import backends, ops
from fastgan.ops.upfirdn2d import filters, native_kernels
from fastgan.ops.upfirdn2d.plan import Taps
from tests.harness import assert_close
from tests.ops.one_pass_problem import work
from tests.ops.upfirdn2d_problem import FILTERS, defined

F32 = torch.float32


def test_a_plane_of_rank_one_is_applied_in_two_passes():
    assert filters.taps_of(FILTERS["rank one"], False, 1.0, F32).separable
    assert not filters.taps_of(FILTERS["plane"], False, 1.0, F32).separable
    rounded = torch.outer(torch.rand(4), torch.rand(5))
    assert filters.taps_of(rounded, False, 1.0, F32).separable
    assert not filters.taps_of(rounded, False, 1.0, torch.float64).separable


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_the_taps_of_a_half_precision_filter_are_multiplied_in_float32(backend, dtype):
    f = torch.tensor([1.0, 3.1, 2.7, 0.9]).to(dtype)
    assert filters.taps_of(f, False, 1.0, F32).separable
    x = torch.randn(1, 2, 6, 6)
    assert_close(ops.upfirdn2d(x, f, padding=2, backend=backend), defined(x.double(), f.float(), padding=2), order=0)


def test_a_filter_that_is_overwritten_is_read_again():
    f = torch.ones(2)
    x = torch.ones(1, 1, 4, 4)
    assert ops.upfirdn2d(x, f).unique().tolist() == [4.0]
    f.mul_(3)
    assert ops.upfirdn2d(x, f).unique().tolist() == [36.0]


def test_the_taps_of_a_filter_are_let_go_with_it():
    f = torch.rand(3, 3)
    filters.taps_of(f, False, 1.0, F32)
    key = id(f)
    assert key in filters._read
    del f
    assert key not in filters._read


def test_a_filter_of_zeros_gives_zeros():
    assert ops.upfirdn2d(torch.randn(1, 1, 4, 4), torch.zeros(2, 2)).abs().max() == 0


def test_a_filter_that_requires_a_gradient_gets_it():
    x, f = torch.randn(1, 2, 5, 5, dtype=torch.float64), torch.rand(3, dtype=torch.float64, requires_grad=True)
    (actual,) = torch.autograd.grad(ops.upfirdn2d(x, f, up=2, padding=2).square().sum(), f)
    (expected,) = torch.autograd.grad(defined(x, f, up=2, padding=2).square().sum(), f)
    assert_close(actual, expected, order=0)


def test_a_double_backward_sends_no_zeros_into_the_input():
    x = torch.randn(1, 2, 5, 5, requires_grad=True)
    by = torch.randn(1, 2, 4, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(ops.upfirdn2d(x, torch.ones(2)), x, by, create_graph=True)
    by_x, by_by = torch.autograd.grad(grad.square().sum(), (x, by), allow_unused=True)
    assert by_x is None
    assert by_by is not None


def test_the_transpose_keeps_the_taps_in_reverse():
    assert Taps((1.0, 2.0, 5.0, 6.0, 7.0), 2, 3, True).flipped().values == (2.0, 1.0, 7.0, 6.0, 5.0)


def test_torch_func_differentiates_and_maps_it():
    x, f = torch.randn(3, 1, 2, 5, 5, dtype=torch.float64), FILTERS["1-D"]
    y = torch.func.vmap(lambda v: ops.upfirdn2d(v, f, up=2, padding=2))(x)
    assert_close(y, torch.stack([defined(v, f, up=2, padding=2) for v in x]), order=0)
    grad = torch.func.grad(lambda v: ops.upfirdn2d(v, f, padding=2).pow(2).sum())(x[0])
    v = x[0].requires_grad_()
    (expected,) = torch.autograd.grad(defined(v, f, padding=2).pow(2).sum(), v)
    assert_close(grad, expected, order=1)


def test_batched_gradients_are_taken():
    x = torch.randn(1, 1, 3, 3, dtype=torch.float64)
    call = lambda v: ops.upfirdn2d(v, FILTERS["1-D"], padding=2)  # noqa: E731
    actual = torch.autograd.functional.jacobian(call, x, vectorize=True)
    assert_close(
        actual, torch.autograd.functional.jacobian(lambda v: defined(v, FILTERS["1-D"], padding=2), x), order=0
    )


def test_autocast_changes_nothing():
    x = torch.randn(1, 2, 6, 6)
    for backend in ("reference", "cpu"):
        plain = ops.upfirdn2d(x, FILTERS["1-D"], padding=2, backend=backend)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(ops.upfirdn2d(x, FILTERS["1-D"], padding=2, backend=backend), plain)


BAD = {
    "no tensor": (TypeError, "input", lambda x: ops.upfirdn2d([1], None)),
    "integers": (TypeError, "input", lambda x: ops.upfirdn2d(x.long(), None)),
    "3-D": (ValueError, "input", lambda x: ops.upfirdn2d(x[0], None)),
    "filter": (TypeError, "filter", lambda x: ops.upfirdn2d(x, [1, 2])),
    "3-D filter": (ValueError, "filter", lambda x: ops.upfirdn2d(x, torch.ones(1, 2, 2))),
    "integer filter": (TypeError, "filter", lambda x: ops.upfirdn2d(x, torch.ones(2).long())),
    "up": (ValueError, "up", lambda x: ops.upfirdn2d(x, None, up=0)),
    "down": (ValueError, "down", lambda x: ops.upfirdn2d(x, None, down=(1, 2, 3))),
    "fraction": (TypeError, "up", lambda x: ops.upfirdn2d(x, None, up=1.5)),
    "padding": (ValueError, "padding", lambda x: ops.upfirdn2d(x, None, padding=(1, 2, 3))),
    "gain": (TypeError, "gain", lambda x: ops.upfirdn2d(x, None, gain=torch.ones((), requires_grad=True))),
    "no gain": (TypeError, "gain", lambda x: ops.upsample2d(x, None, gain=None)),
    "nothing left": (ValueError, "does not fit", lambda x: ops.upfirdn2d(x, torch.ones(9))),
    "backend": (ValueError, "backend", lambda x: ops.upfirdn2d(x, None, backend="nvcc")),
}


@pytest.mark.parametrize(("error", "said", "call"), BAD.values(), ids=BAD)
def test_bad_input_is_refused_by_name(error, said, call):
    with pytest.raises(error, match=said):
        call(torch.randn(1, 2, 6, 6))


SIZES = {
    "upsample2d": (dict(up=2), (12, 16)),
    "upsample2d in one direction": (dict(up=(3, 1)), (6, 24)),
    "downsample2d": (dict(down=2), (3, 4)),
    "filter2d": ({}, (6, 8)),
}


@pytest.mark.parametrize("taps", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("name", SIZES)
def test_the_filter_is_centered(name, taps):
    options, size = SIZES[name]
    x = torch.ones(1, 1, 6, 8, dtype=torch.float64)
    f = torch.ones(taps, dtype=torch.float64) / taps
    y = getattr(ops, name.split()[0])(x, f, **options)
    if taps >= 3 or name == "filter2d":  # a filter smaller than the factor leaves a part of the image out
        assert y.shape[2:] == size
    # The center of gravity of an even image is its middle, up to the half pixel of a filter of even length.
    weights = torch.arange(y.shape[3], dtype=torch.float64)
    middle = (y * weights).sum() / y.sum()
    assert abs(middle - (y.shape[3] - 1) / 2) <= 0.5


def test_upsampling_keeps_the_mean_of_a_constant_image():
    f = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
    y = ops.upsample2d(torch.ones(1, 1, 8, 8), f, up=2)
    torch.testing.assert_close(y[:, :, 2:-2, 2:-2], torch.ones(1, 1, 12, 12))


def test_the_cpu_kernel_runs_where_it_can(monkeypatch):
    calls = []
    kernel = native_kernels.upfirdn2d
    monkeypatch.setattr(native_kernels, "upfirdn2d", lambda *a: calls.append(1) or kernel(*a))
    x = torch.randn(1, 2, 6, 6, requires_grad=True)
    ops.upfirdn2d(x, FILTERS["1-D"], padding=2).sum().backward()
    assert len(calls) == 2
    with backends.use_backend("reference"):
        ops.upfirdn2d(x, FILTERS["1-D"], padding=2).sum().backward()
    assert len(calls) == 2


class Blocks(nn.Module):
    """Convolutions, each followed by a filtered downsampling, as in StyleGAN2's discriminator."""

    def __init__(self, resample):
        super().__init__()
        torch.manual_seed(0)
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, 1, 1) for a, b in ((3, 16), (16, 32)))
        self.head = nn.Linear(32 * 16, 1)
        self.register_buffer("f", torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8)
        self.resample = resample

    def forward(self, x):
        for conv in self.convs:
            x = self.resample(nn.functional.leaky_relu(conv(x), 0.2), self.f, down=2, padding=1)
        return self.head(x.flatten(1))


def test_a_discriminator_through_it_is_one_pass_exact_and_at_four_forwards():
    x = torch.randn(4, 3, 16, 16)
    plain, ours = Blocks(lambda *a, **k: defined(a[0].double(), *a[1:], **k).float()), Blocks(ops.upfirdn2d)
    assert fastgan.explain_penalty(ours, x) == "one pass"
    v = x.clone().requires_grad_()
    logits = plain(v)
    (g,) = torch.autograd.grad(logits.sum(), v, create_graph=True)
    (nn.functional.softplus(-logits).mean() + 5 * g.square().flatten(1).sum(1).mean()).backward()

    def step():
        logits, penalty = fastgan.logits_and_penalty(ours, x, kind="r1", weight=10.0)
        (nn.functional.softplus(-logits).mean() + penalty).backward()

    spent = work(step) / work(lambda: ours(x))
    for name, parameter in ours.named_parameters():
        assert_close(parameter.grad, plain.get_parameter(name).grad.double(), order=1)
    assert spent <= 4.1


def test_it_is_seen_by_modes_and_subclasses():
    seen = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    x = torch.randn(1, 1, 4, 4)
    with Watch():
        ops.upfirdn2d(x, None, up=2)
        ops.upfirdn2d(input=x, filter=None, up=2)
    assert seen.count(ops.upfirdn2d) == 2
    wrapped = x.as_subclass(type("Wrapped", (torch.Tensor,), {}))
    assert type(ops.upfirdn2d(wrapped, None, up=2)) is type(wrapped)


def test_a_compiled_function_may_call_it():
    x, f = torch.randn(2, 2, 6, 6), FILTERS["1-D"]
    compiled = torch.compile(lambda v: ops.upfirdn2d(v, f, up=2, padding=2), backend="eager", fullgraph=True)
    assert_close(compiled(x), defined(x.double(), f, up=2, padding=2), order=0)


def test_a_compiled_penalty_through_it_has_the_gradients_of_the_eager_one():
    model, x = Blocks(ops.upfirdn2d), torch.randn(4, 3, 16, 16)

    def step(x):
        logits, penalty = fastgan.logits_and_penalty(model, x, kind="r1", weight=10.0)
        return nn.functional.softplus(-logits).mean() + penalty

    step(x).backward()
    expected = {name: parameter.grad.double() for name, parameter in model.named_parameters()}
    model.zero_grad()
    torch.compile(step, backend="aot_eager", fullgraph=True)(x).backward()
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, expected[name], order=1)


def test_a_recorded_model_has_pytorchs_operations_alone():
    class Half(nn.Module):
        def forward(self, x):
            return ops.upfirdn2d(x, FILTERS["1-D"], down=2, padding=1)

    x = torch.randn(2, 3, 8, 8)
    expected = defined(x.double(), FILTERS["1-D"], down=2, padding=1)
    traced = torch.jit.trace(Half(), x)
    assert "fastgan::" not in str(traced.inlined_graph)
    exported = torch.export.export(Half(), (x,)).module()
    for recorded in (traced, exported, torch.fx.experimental.proxy_tensor.make_fx(Half())(x)):
        assert_close(recorded(x), expected, order=0)
