"""filtered_lrelu, conv2d_resample, grid_sample, and bias_act with StyleGAN's names: values, two orders, one pass."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastgan
from fastgan import backends, ops
from fastgan.ops.filtered_lrelu import native_kernels as filtered_kernels
from tests.harness import DTYPES, assert_close
from tests.hypothesis_if_there import given, settings, st
from tests.ops.one_pass_problem import work
from tests.ops.upfirdn2d_problem import defined

FU, FD = (torch.tensor(taps, dtype=torch.float64) for taps in ([1.0, 5.0, 9.0, 9.0, 5.0, 1.0], [1.0, 2.0, 4.0, 2.0]))
FU, FD = FU / FU.sum(), FD / FD.sum()


def orders(function, *operands):
    """The values, the gradients, and the gradients of their squares."""
    operands = [t.detach().clone().requires_grad_() for t in operands]
    y = function(*operands)
    by = torch.cos(torch.arange(y.numel(), dtype=y.dtype)).view_as(y)
    grads = torch.autograd.grad((y.pow(3) * by).sum(), operands, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in grads), operands)
    return [(0, y), *((1, g) for g in grads), *((2, g) for g in second)]


def same_orders(ours, theirs, *operands):
    for (order, actual), (_, expected) in zip(orders(ours, *operands), orders(theirs, *operands), strict=True):
        assert_close(actual, expected, order=order)


FILTERED = {
    "up and down": dict(up=2, down=2, padding=(5, 4, 6, 3)),
    "pairs": dict(up=(2, 1), down=(1, 2), padding=(4, 5), gain=1.0, slope=0.0),
    "clamp": dict(up=4, down=2, padding=7, clamp=0.3),
    "flipped": dict(up=2, down=1, padding=4, flip_filter=True, slope=0.5),
}


@pytest.mark.parametrize(
    ("name", "backend"),
    [*((name, backend) for name in FILTERED for backend in ("reference", "cpu")), ("pairs and clamp", "triton")],
)
def test_filtered_lrelu_equals_its_steps(name, backend):
    options = FILTERED[name] if name in FILTERED else FILTERED["pairs"] | {"clamp": 0.3}
    up, down, flip = options["up"], options["down"], options.get("flip_filter", False)
    gain, clamp = options.get("gain", 2**0.5), options.get("clamp")

    def steps(x, bias):
        scale = up * up if isinstance(up, int) else up[0] * up[1]
        y = defined(x + bias[:, None, None], FU, up=up, padding=options["padding"], gain=scale, flip_filter=flip)
        y = F.leaky_relu(y, options.get("slope", 0.2)) * gain
        return defined(y if clamp is None else y.clamp(-clamp, clamp), FD, down=down, flip_filter=flip)

    def ours(x, bias):
        return ops.filtered_lrelu(x, FU, FD, bias, **options, backend=backend)

    n, c = (1, 1) if backend == "triton" else (2, 3)  # the interpreter is slow
    same_orders(ours, steps, torch.randn(n, c, 7, 8).double(), torch.randn(c).double())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("clamp", [None, 0.5])
def test_filtered_lrelu_keeps_no_upsampled_image_on_a_cpu(dtype, clamp):
    """The kernel has the values and derivatives of the separate steps, also where a row of bits is not full."""
    x = torch.randn(3, 5, 9, 13).to(dtype)
    options = dict(up=2, down=2, padding=(5, 4, 6, 3), clamp=clamp)
    by = torch.randn_like(ops.filtered_lrelu(x, FU, FD, **options, backend="reference"))
    h = torch.randn_like(x)

    def results(x, by, h, backend):
        x, by = x.clone().requires_grad_(), by.clone().requires_grad_()
        y = ops.filtered_lrelu(x, FU, FD, **options, backend=backend)
        (dx,) = torch.autograd.grad(y, x, by, create_graph=True)
        return [y, dx, *torch.autograd.grad(dx, by, h)]

    exact = results(x.double(), by.double(), h.double(), "reference")
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
        actual = results(x, by, h, None)
    assert max(kept) == 15 * 22 * 4  # 15 planes of 22 rows of 30 bits
    reference = results(x, by, h, "reference")
    for order, (a, e, r) in enumerate(zip(actual, exact, reference, strict=True)):
        assert_close(a, e, order=order, reference=r)


def test_filtered_lrelu_runs_its_kernel_where_it_can(monkeypatch):
    calls = []
    kernel = filtered_kernels.filtered_lrelu
    monkeypatch.setattr(filtered_kernels, "filtered_lrelu", lambda *a: calls.append(a[5]) or kernel(*a))
    x = torch.randn(2, 3, 8, 8)

    def ran(x, **options):
        calls.clear()
        ops.filtered_lrelu(x.requires_grad_(), FU, FD, up=2, padding=5, **options).sum().backward()
        return list(calls)

    assert ran(x) == [False, True]  # whether the slopes are read
    assert ran(x, clamp=1.0) == [False, True]
    assert ran(x.detach().to(memory_format=torch.channels_last)) == [False, True]
    assert ran(x, backend="reference") == []
    with backends.use_backend("reference"):
        assert ran(x) == []
    with pytest.raises(ValueError, match="clamp"):
        ran(x, clamp=-1.0)
    with pytest.raises(ValueError, match="does not fit"):
        ops.filtered_lrelu(x, FU, torch.ones(99))


CLAMPED = {
    "filtered_lrelu": lambda x, clamp, backend: ops.filtered_lrelu(x, clamp=clamp, backend=backend),
    "of channels_last": lambda x, clamp, backend: ops.filtered_lrelu(
        x.to(memory_format=torch.channels_last), clamp=clamp, backend=backend
    ),
    **{
        name: lambda x, clamp, backend, name=name: ops.bias_act(
            x, activation=name, gain=2**0.5, clamp=clamp, backend=backend
        )
        for name in ("relu", "leaky_relu")
    },
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("name", CLAMPED)
def test_in_half_precision_a_value_that_would_be_rounded_to_the_clamp_is_clamped(name, backend, dtype):
    """The mask is that of float64. A composition of operations in bfloat16 rounds before it clamps.

    The gradient of filtered_lrelu was up to 116 % off for that reason (2 x 2 pixels, up 5, clamp 1.5), and 30 % with
    7 x 8 pixels, and 13 % with a bias, whose sum with the input was rounded too. It is 0.24 % now.
    """
    values = torch.linspace(0.5, 1.5, 999).to(dtype)
    products = values.double() * 2**0.5
    chosen = (products - products.to(dtype).double()).argmax()  # it is rounded down by the most
    x = values[chosen].expand(1, 2, 2, 2).contiguous().requires_grad_()
    y = CLAMPED[name](x, products[chosen].to(dtype).item(), backend)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert not grad.any()


def test_filtered_lrelu_rounds_neither_the_sum_nor_the_upsampled_image():
    x, bias = torch.randn(1, 2, 7, 8).bfloat16(), torch.randn(2).bfloat16()
    assert (x + bias[:, None, None] != x.double() + bias.double()[:, None, None]).any()  # it would be rounded
    for up, clamp in ((5, 1.5), (5, 0.3), (2, 0.3)):
        options = dict(up=up, down=2, padding=6, clamp=clamp)
        by = torch.randn_like(ops.filtered_lrelu(x, FU, FD, **options))

        def results(x, bias, by, backend, mode=nullcontext, options=options):
            x, bias = x.clone().requires_grad_(), bias.clone().requires_grad_()
            with mode():
                y = ops.filtered_lrelu(x, FU, FD, bias, **options, backend=backend)
            return y, *torch.autograd.grad(y, (x, bias), by)

        exact = results(x.double(), bias.double(), by.double(), "reference")
        for backend, mode in (
            ("reference", nullcontext),
            ("cpu", nullcontext),
            ("cpu", fastgan.twice_differentiable),
            *([("triton", nullcontext)] if up == 2 else []),  # the interpreter is slow
        ):
            for actual, expected in zip(results(x, bias, by, backend, mode), exact, strict=True):
                assert_close(actual, expected, order=1, reference=expected.to(x.dtype))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_filtered_lrelu_takes_a_bias_in_float32_and_a_bias_alone_that_is_trained(backend):
    x, bias = torch.randn(2, 3, 7, 8).half(), torch.randn(3, requires_grad=True)
    y = ops.filtered_lrelu(x, FU, FD, bias, up=2, down=2, padding=5, backend=backend)
    y.double().square().sum().backward()
    exact = bias.detach().double().requires_grad_()
    z = ops.filtered_lrelu(x.double(), FU, FD, exact, up=2, down=2, padding=5, backend="reference")
    z.square().sum().backward()
    assert y.dtype == torch.float16
    assert bias.grad.dtype == torch.float32
    torch.testing.assert_close(bias.grad.double(), exact.grad, rtol=1e-3, atol=1e-2)
    for wrong in (torch.zeros(2), torch.zeros(3, 1), torch.zeros(3).double(), [0.0] * 3):
        with pytest.raises((TypeError, ValueError), match=r"^bias must"):
            ops.filtered_lrelu(x, FU, FD, wrong, padding=9, backend=backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_filtered_lrelu_keeps_the_memory_format(backend, dtype):
    x = torch.randn(2, 3, 7, 8).to(dtype)
    options = dict(up=2, down=2, padding=(5, -4, 6, 3), clamp=0.5)

    def results(x):
        x = x.clone().requires_grad_()
        y = ops.filtered_lrelu(x, FU, FD, **options, backend=backend)
        (grad,) = torch.autograd.grad(y, x, torch.ones_like(y), create_graph=True)
        return y, grad

    for actual, expected in zip(results(x.to(memory_format=torch.channels_last)), results(x), strict=True):
        assert actual.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(actual, expected)


@settings(max_examples=15, deadline=None)
@given(
    sizes=st.tuples(st.integers(0, 2), st.integers(1, 3), st.integers(1, 5), st.integers(1, 5)),
    factors=st.tuples(*[st.integers(1, 3)] * 4),
    padding=st.tuples(*[st.integers(-2, 6)] * 4),
    filters=st.tuples(*[st.sampled_from([None, (1,), (4,), (3,), (2, 3), (1, 4)])] * 2),
    biased=st.booleans(),
    options=st.fixed_dictionaries(
        dict(clamp=st.sampled_from([None, 0.3]), flip_filter=st.booleans(), slope=st.sampled_from([0.2, 0.0, -0.5]))
    ),
    last=st.booleans(),
)
def test_any_filtered_lrelu_equals_its_steps_to_second_order(sizes, factors, padding, filters, biased, options, last):
    x, bias = torch.randn(sizes, dtype=torch.float64), torch.randn(sizes[1], dtype=torch.float64)
    x = x.to(memory_format=torch.channels_last) if last else x
    fu, fd = (None if taps is None else torch.randn(taps, dtype=torch.float64) for taps in filters)
    up, down, flip, clamp = factors[:2], factors[2:], options["flip_filter"], options["clamp"] or 1e9

    def steps(x, bias):
        x = x + bias[:, None, None] if biased else x + 0 * bias.sum()
        u = defined(x, fu, up=up, padding=padding, gain=up[0] * up[1], flip_filter=flip)
        y = (F.leaky_relu(u, options["slope"]) * 2**0.5).clamp(-clamp, clamp)
        return defined(y, fd, down=down, flip_filter=flip)

    def ours(x, bias, backend="cpu"):
        y = ops.filtered_lrelu(x, fu, fd, bias if biased else None, up, down, padding, **options, backend=backend)
        return y if biased else y + 0 * bias.sum()

    size = [sizes[2] * up[1] + sum(padding[2:]), sizes[3] * up[0] + sum(padding[:2])]
    for f in (fu, fd):
        size = [side - ((1, 1) if f is None else (len(f), f.shape[-1]))[i] + 1 for i, side in enumerate(size)]
        if min(size) < 1:
            with pytest.raises(ValueError, match="does not fit"):
                ours(x, bias)
            return
    for backend in ("cpu", "reference"):
        same_orders(partial(ours, backend=backend), steps, x, bias)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_filtered_lrelu_passes_a_nan_on(backend):
    x = torch.zeros(1, 1, 4, 4)
    x[0, 0, 0, 0] = torch.nan
    assert ops.filtered_lrelu(x, clamp=1.0, backend=backend).isnan().sum() == 1


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_filtered_lrelu_gives_the_same_on_every_instruction_set(isa):
    x, y, bias = torch.randn(4, 9, 30), torch.full((4, 17, 59), torch.nan), torch.randn(2)
    signs = torch.zeros(4 * 17 * 8, dtype=torch.uint8)
    first, second = (4, 1, 9, 30, 17, 59, 2, 2, 1, 1, 1, 1, 3, 3), (4, 1, 17, 59, 17, 59, 1, 1, 1, 1, 0, 0, 1, 1)
    steps = first, True, [1.0, 2.0, 1.0] * 2, second, True, [1.0, 1.0]
    options = 0.2, 1.5, float("inf"), 2
    try:
        backends.native().filtered_lrelu(
            "float32", x.data_ptr(), bias.data_ptr(), 2, y.data_ptr(), signs.data_ptr(), 0, False, *steps, *options, isa
        )
    except ValueError as missing:
        pytest.skip(str(missing))
    f = torch.tensor([1.0, 2.0, 1.0])
    u = defined((x + bias.repeat(2)[:, None, None])[None].double(), f, up=2, padding=(1, 0, 1, 0))
    assert_close(y[None], F.leaky_relu(u, 0.2) * 1.5, order=0)
    unpacked = (signs.view(4, 17, 8, 1) >> torch.arange(8)).bitwise_and(1).view(4, 17, 64)
    assert torch.equal(unpacked[:, :, :59].bool(), u[0] > 0)


def test_filtered_lrelu_without_filters_is_a_leaky_relu():
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(ops.filtered_lrelu(x, gain=1.0), F.leaky_relu(x, 0.2))


@pytest.mark.parametrize("kernel", [1, 3, (2, 3)], ids=str)
@pytest.mark.parametrize("flip_weight", [True, False])
@pytest.mark.parametrize(("up", "down"), [(1, 1), (2, 1), (1, 2), (2, 2), (3, 2)])
@pytest.mark.parametrize("groups", [1, 2])
def test_conv2d_resample_equals_its_steps(kernel, flip_weight, up, down, groups):
    kh, kw = (kernel, kernel) if isinstance(kernel, int) else kernel
    f, taps = FD.float().double(), len(FD)

    def steps(x, weight):
        around = [2, 1, 3, 2]
        if up > 1:
            around = [p + q for p, q in zip(around, [(taps + up - 1) // 2, (taps - up) // 2] * 2, strict=True)]
        if down > 1:
            around = [p + q for p, q in zip(around, [(taps - down + 1) // 2, (taps - down) // 2] * 2, strict=True)]
        x = defined(x, f if up > 1 else None, up=up, padding=tuple(around), gain=up * up)
        x = F.conv2d(x, weight if flip_weight else weight.flip((2, 3)), groups=groups)
        return defined(x, f if down > 1 else None, down=down)

    def ours(x, weight):
        return ops.conv2d_resample(x, weight, f, up, down, (2, 1, 3, 2), groups, flip_weight)

    same_orders(ours, steps, torch.randn(2, 4, 7, 6).double(), torch.randn(6, 4 // groups, kh, kw).double())


def test_conv2d_resample_convolves_at_the_lower_resolution():
    x, weight = torch.randn(1, 4, 16, 16), torch.randn(4, 4, 3, 3)
    plain = work(lambda: F.conv2d(x, weight, padding=1))
    assert work(lambda: ops.conv2d_resample(x, weight, FD, up=2, padding=1)) <= plain  # at 32 x 32 it would be 4
    assert work(lambda: ops.conv2d_resample(x, weight, FD, down=2, padding=1)) <= plain / 4


@pytest.mark.parametrize("factor", [0, 1.5, (2, 2)], ids=str)
def test_conv2d_resample_refuses_factors(factor):
    with pytest.raises(ValueError, match="down"):
        ops.conv2d_resample(torch.randn(1, 1, 4, 4), torch.randn(1, 1, 3, 3), down=factor)


IMAGE, WEIGHT, TAPS = torch.randn(1, 4, 6, 6), torch.randn(4, 4, 3, 3), torch.ones(3)
BAD = {
    "up_filter": (TypeError, lambda: ops.filtered_lrelu(IMAGE, [1, 2])),
    "down_filter": (ValueError, lambda: ops.filtered_lrelu(IMAGE, TAPS, torch.ones(5))),
    "down_filter must be floating": (TypeError, lambda: ops.filtered_lrelu(IMAGE, TAPS, TAPS.int())),
    "up must": (TypeError, lambda: ops.filtered_lrelu(IMAGE, up=2.0)),
    "^slope": (TypeError, lambda: ops.filtered_lrelu(IMAGE, slope="0.2")),
    "input must be a tensor": (TypeError, lambda: ops.conv2d_resample([1], WEIGHT)),
    "input must have 4": (ValueError, lambda: ops.conv2d_resample(IMAGE[0], WEIGHT)),
    "weight must be a tensor": (TypeError, lambda: ops.conv2d_resample(IMAGE, [1])),
    "weight must have 4": (ValueError, lambda: ops.conv2d_resample(IMAGE, WEIGHT[0])),
    "weight must have shape": (ValueError, lambda: ops.conv2d_resample(IMAGE, WEIGHT[:, :2], up=2)),
    "groups=2": (ValueError, lambda: ops.conv2d_resample(IMAGE, WEIGHT[:3, :2], groups=2)),
    "groups must": (ValueError, lambda: ops.conv2d_resample(IMAGE, WEIGHT, groups=0)),
    r"weight of shape \(3, 3\)": (ValueError, lambda: ops.conv2d_resample(IMAGE, WEIGHT, padding=-2)),
    r"filter of shape \(9, 9\)": (
        ValueError,
        lambda: ops.conv2d_resample(IMAGE, WEIGHT, TAPS.repeat(3), down=3, padding=-2),
    ),
    "argument 'grid'": (TypeError, lambda: ops.grid_sample(IMAGE.clone().requires_grad_(), [1], align_corners=True)),
}


@pytest.mark.parametrize("message", BAD)
def test_an_error_names_the_argument(message):
    error, call = BAD[message]
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("padding_mode", ["zeros", "border", "reflection"])
@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
def test_grid_sample_equals_pytorchs_to_second_order(mode, padding_mode):
    grid = torch.rand(2, 5, 4, 2, dtype=torch.float64) * 2.6 - 1.3
    options = dict(mode=mode, padding_mode=padding_mode, align_corners=False)
    x = torch.randn(2, 3, 6, 7, dtype=torch.float64)
    same_orders(lambda v: ops.grid_sample(v, grid, **options), lambda v: F.grid_sample(v, grid, **options), x)


def test_grid_sample_leaves_other_calls_to_pytorch():
    x = torch.randn(1, 2, 5, 5, dtype=torch.float64)
    grid = torch.rand(1, 3, 3, 2, dtype=torch.float64) * 1.6 - 0.8
    options = dict(align_corners=True)
    same_orders(lambda v, g: ops.grid_sample(v, g, **options), lambda v, g: F.grid_sample(v, g, **options), x, grid)
    volume, points = torch.randn(1, 1, 3, 3, 3, requires_grad=True), torch.rand(1, 2, 2, 2, 3)
    assert torch.equal(ops.grid_sample(volume, points, **options), F.grid_sample(volume, points, **options))
    with pytest.raises(ValueError, match="mode"):
        ops.grid_sample(x.requires_grad_(), grid, mode="cubic", align_corners=True)


def test_grid_sample_sends_no_zeros_into_the_input():
    x, by = torch.randn(1, 1, 4, 4, requires_grad=True), torch.randn(1, 1, 2, 2, requires_grad=True)
    y = ops.grid_sample(x, torch.rand(1, 2, 2, 2), align_corners=False)
    (grad,) = torch.autograd.grad(y, x, by, create_graph=True)
    assert torch.autograd.grad(grad.square().sum(), (x, by), allow_unused=True)[0] is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["elu", "selu"])
def test_elu_and_selu_match_float64(activation, dtype):
    x, bias = torch.randn(3, 4, 5).to(dtype), torch.randn(4).to(dtype)
    exact = getattr(F, activation)(x.double() + bias.double()[:, None]) * 1.5
    actual = ops.bias_act(x, bias, activation=activation, gain=1.5, clamp=2.0)
    assert_close(actual, exact.clamp(-2, 2), order=0, reference=exact.clamp(-2, 2).to(dtype))
    overwritten = x.clone()
    assert ops.bias_act(overwritten, bias, activation=activation, gain=1.5, clamp=2.0, inplace=True) is overwritten
    assert torch.equal(overwritten, actual)


@pytest.mark.parametrize("activation", ["elu", "selu"])
def test_elu_and_selu_have_two_orders(activation):
    plain = getattr(F, activation)
    x, bias = torch.randn(2, 3, 4).double(), torch.randn(3).double()
    same_orders(lambda v, b: ops.bias_act(v, b, activation=activation), lambda v, b: plain(v + b[:, None]), x, bias)


def test_elu_on_a_named_backend_without_it_is_refused():
    with pytest.raises(backends.BackendUnavailable, match="unfused"):
        ops.bias_act(torch.randn(2, 2), activation="elu", backend="cpu")


GAINS = {"linear": 1, "relu": 2**0.5, "lrelu": 2**0.5, "tanh": 1, "sigmoid": 1, "elu": 1, "selu": 1, "softplus": 1}
GAINS |= {"swish": 2**0.5}


@pytest.mark.parametrize("activation", GAINS)
def test_without_a_gain_the_activations_have_stylegans(activation):
    name = {"lrelu": "leaky_relu", "swish": "silu"}.get(activation, activation)
    plain = torch.clone if name == "linear" else getattr(torch if name in ("tanh", "sigmoid") else F, name)
    x = torch.randn(3, 4)
    want = plain(x, 0.2) if activation == "lrelu" else plain(x)
    torch.testing.assert_close(ops.bias_act(x, activation=activation, gain=None), want * GAINS[activation])


class Discriminator(nn.Module):
    """Layers of StyleGAN2's and StyleGAN3's kinds, from functions that are given by name."""

    def __init__(self, functions, clamp=None):
        super().__init__()
        torch.manual_seed(0)
        draw = lambda *sizes: nn.Parameter(torch.randn(sizes, dtype=torch.float64) / 4)  # noqa: E731
        self.first, self.second, self.skip = draw(8, 3, 1, 1), draw(12, 8, 3, 3), draw(12, 8, 1, 1)
        self.biases = nn.ParameterList(draw(n) for n in (8, 12, 12))
        self.head = nn.Linear(12 * 16, 1).double()
        self.functions, self.clamp = functions, clamp
        self.register_buffer("grid", torch.rand(1, 8, 8, 2, dtype=torch.float64) * 2 - 1)

    def forward(self, x):
        f = self.functions
        x = f["grid_sample"](x, self.grid.expand(len(x), -1, -1, -1), align_corners=False)
        x = f["bias_act"](f["conv"](x, self.first, None, 1, 1, 0), self.biases[0], 2**0.5, self.clamp)
        skip = f["conv"](x, self.skip, FD, 1, 2, 0)
        x = f["bias_act"](f["conv"](x, self.second, FD, 1, 2, 1), self.biases[1], 1.0, self.clamp)
        x = f["filtered"](x + skip, self.biases[2], self.clamp)
        return self.head(x.flatten(1))


def _plain_conv(x, weight, f, up, down, padding):
    around = (padding,) * 4
    if down > 1:
        around = tuple(padding + p for p in [(len(f) - down + 1) // 2, (len(f) - down) // 2] * 2)
    return F.conv2d(defined(x, f if down > 1 else None, padding=around), weight, stride=down)


def _plain_act(x, bias, gain, clamp):
    y = F.leaky_relu(x + bias[:, None, None], 0.2) * gain
    return y if clamp is None else y.clamp(-clamp, clamp)


def _plain_filtered(x, bias, clamp):
    y = _plain_act(
        defined(x + bias[:, None, None], FU, up=2, padding=5, gain=4), torch.zeros(12).double(), 2**0.5, clamp
    )
    return defined(y, FU, down=2)[:, :, :4, :4]


PLAIN = dict(grid_sample=F.grid_sample, conv=_plain_conv, bias_act=_plain_act, filtered=_plain_filtered)
OURS = dict(
    grid_sample=ops.grid_sample,
    conv=lambda *a: ops.conv2d_resample(*a),
    bias_act=lambda x, b, gain, clamp: ops.bias_act(x, b, gain=gain, clamp=clamp),
    filtered=lambda x, b, clamp: ops.filtered_lrelu(x, FU, FU, b, 2, 2, 5, clamp=clamp)[:, :, :4, :4],
)


@pytest.mark.parametrize("clamp", [None, 0.5])
def test_a_discriminator_of_them_is_one_pass_exact_and_at_four_forwards(clamp):
    ours = Discriminator(OURS, clamp)
    plain = copy.deepcopy(ours)
    plain.functions = PLAIN
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    assert fastgan.explain_penalty(ours, x) == "one pass"
    v = x.clone().requires_grad_()
    logits = plain(v)
    (g,) = torch.autograd.grad(logits.sum(), v, create_graph=True)
    (F.softplus(-logits).mean() + 5 * g.square().flatten(1).sum(1).mean()).backward()

    def step():
        logits, penalty = fastgan.logits_and_penalty(ours, x, kind="r1", weight=10.0)
        (F.softplus(-logits).mean() + penalty).backward()

    forward = work(lambda: ours(x))
    assert work(step) <= 4.1 * forward
    for name, parameter in ours.named_parameters():
        assert_close(parameter.grad, plain.get_parameter(name).grad, order=1)


def test_smooth_activations_of_bias_act_are_explained():
    class Smooth(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bias = nn.Conv2d(3, 4, 3), nn.Parameter(torch.zeros(4))

        def forward(self, x):
            return ops.bias_act(self.conv(x), self.bias, activation="swish").sum((1, 2, 3))

    assert "is smooth" in fastgan.explain_penalty(Smooth(), torch.randn(2, 3, 8, 8))
