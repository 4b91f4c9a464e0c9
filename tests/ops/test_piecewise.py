"""Piecewise affine functions of PyTorch, rerouted: its results to every order, and no zeros through the forward."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastgan
from fastgan.bench.flops import count_flops
from fastgan.bench.memory import saved_bytes
from fastgan.ops.piecewise import ROUTES
from tests.harness import assert_close

LINES, IMAGES, VOLUMES = (2, 3, 11), (2, 3, 7, 8), (1, 2, 5, 6, 5)
SAMPLES = torch.tensor([[[0.1, 0.7], [0.9, 0.3], [0.5, 0.5]]]).expand(2, 3, 2)


def first(function):
    return lambda x: function(x)[0]


POOLS = {
    "max_pool1d": (LINES, lambda x: F.max_pool1d(x, 3, 2, 1)),
    "max_pool1d of one sample": (LINES[1:], lambda x: F.max_pool1d(x, 2, ceil_mode=True)),
    "max_pool1d, with indices": (LINES, first(lambda x: F.max_pool1d(x, 2, return_indices=True))),
    "max_pool2d": (IMAGES, lambda x: F.max_pool2d(x, (3, 2), 2, 1, ceil_mode=True)),
    "max_pool2d, dilated": (IMAGES, lambda x: F.max_pool2d(x, 2, 1, dilation=(2, 3))),
    "max_pool2d of one sample": (IMAGES[1:], lambda x: F.max_pool2d(x, 2)),
    "max_pool2d, with indices": (IMAGES, first(nn.MaxPool2d(2, return_indices=True))),
    "max_pool3d": (VOLUMES, lambda x: F.max_pool3d(x, 2, padding=1)),
    "max_pool3d, with indices": (VOLUMES, first(lambda x: F.max_pool3d(x, 2, return_indices=True))),
    "torch.max_pool1d": (LINES, lambda x: torch.max_pool1d(x, 2)),
    "torch.max_pool1d_with_indices": (LINES, first(lambda x: torch.max_pool1d_with_indices(x, 2))),
    "torch.max_pool2d": (IMAGES, lambda x: torch.max_pool2d(x, 2, 3)),
    "torch.max_pool3d": (VOLUMES, lambda x: torch.max_pool3d(x, [2, 2, 1])),
    "adaptive_max_pool1d": (LINES, lambda x: F.adaptive_max_pool1d(x, 4)),
    "torch.adaptive_max_pool1d": (LINES, first(lambda x: torch.adaptive_max_pool1d(x, 4))),
    "adaptive_max_pool2d": (IMAGES, nn.AdaptiveMaxPool2d((3, None))),
    "adaptive_max_pool2d, with indices": (IMAGES, first(nn.AdaptiveMaxPool2d(3, return_indices=True))),
    "adaptive_max_pool3d": (VOLUMES, lambda x: F.adaptive_max_pool3d(x, (2, 4, 3))),
    "fractional_max_pool2d": (IMAGES, lambda x: F.fractional_max_pool2d(x, 2, (4, 5), _random_samples=SAMPLES.to(x))),
    "fractional_max_pool3d": (VOLUMES, first(lambda x: F.fractional_max_pool3d(x, 2, 3, return_indices=True))),
    "adaptive_avg_pool1d": (LINES, lambda x: F.adaptive_avg_pool1d(x, 4)),
    "adaptive_avg_pool1d of one sample": (LINES[1:], nn.AdaptiveAvgPool1d(5)),
    "adaptive_avg_pool2d": (IMAGES, nn.AdaptiveAvgPool2d((None, 3))),
    "adaptive_avg_pool3d": (VOLUMES, lambda x: F.adaptive_avg_pool3d(x, [2, 4, 3])),
    "a mean": (IMAGES, lambda x: F.adaptive_avg_pool2d(x, 1)),
    "area of lines": (LINES, lambda x: F.interpolate(x, 4, mode="area")),
    "area of images": (IMAGES, lambda x: F.interpolate(x, scale_factor=0.5, mode="area")),
    "area of volumes": (VOLUMES, lambda x: F.interpolate(x, (3, 2, 5), None, "area")),
}
PADS = {
    **{
        f"{mode} of {len(shape) - 2} dimensions": (shape, lambda x, mode=mode, pad=pad: F.pad(x, pad, mode))
        for mode in ("reflect", "replicate", "circular")
        for shape, pad in ((LINES, (2, 1)), (IMAGES, [1, 2, 0, 3]), (VOLUMES, (1, 0, 2, 2, 1, 3)))
    },
    "reflect of one sample": (IMAGES[1:], nn.ReflectionPad2d((1, 2, 3, 0))),
    "circular, all the way round": (IMAGES, lambda x: F.pad(x, (8, 8, 7, 7), "circular")),
    "circular, cut off": (IMAGES, lambda x: F.pad(x, (-1, 2, 0, 0), "circular")),
}
BOUND = torch.linspace(-0.5, 0.5, 8)
ELEMENTWISE = {
    "hardtanh": nn.Hardtanh(-0.5, 0.7),
    "relu6": lambda x: nn.ReLU6()(4 * x),
    "F.relu6": lambda x: F.relu6(4 * x),
    "clamp": lambda x: x.clamp(-0.5, 0.5),
    "clamp from below": lambda x: torch.clamp(x, min=0),
    "clamp from above": lambda x: x.clip(max=0.25),
    "clamp_min": lambda x: x.clamp_min(-0.5),
    "clamp_max": lambda x: torch.clamp_max(x, 0.5),
    "clamp by tensors": lambda x: torch.clip(x, BOUND.to(x), BOUND.to(x) + 0.5),
    "clamp by a number that is a tensor": lambda x: x.clamp(min=torch.tensor(0.25)),
    "threshold": nn.Threshold(0.25, 3.0),
    "torch.threshold": lambda x: torch.threshold(x, 0.25, value=-1),
    "softshrink": nn.Softshrink(0.25),
    "hardshrink": nn.Hardshrink(0.25),
    "Tensor.hardshrink": lambda x: x.hardshrink(0.5),
    "abs": lambda x: x.abs(),
    "abs()": abs,
    "absolute": torch.absolute,
    "maximum": lambda x: torch.maximum(x, BOUND.to(x)),
    "minimum, constant first": lambda x: torch.minimum(BOUND.to(x), x),
    "torch.max": lambda x: torch.max(x, torch.zeros_like(x)),
    "Tensor.min": lambda x: x.min(other=torch.tensor(0.25).to(x)),
    "rrelu": lambda x: seeded(lambda: F.rrelu(x, 0.1, 0.4, training=True)),
    "torch.rrelu": lambda x: seeded(lambda: torch.rrelu(x, training=True)),
    "rrelu in evaluation": nn.RReLU().eval(),
    "prelu": lambda x: F.prelu(x, torch.tensor([0.3, -0.2, 1.5]).to(x)),
    "Tensor.prelu, one slope": lambda x: x.prelu(torch.tensor([0.3]).to(x)),
}
IN_PLACE = {
    "hardtanh": lambda x: F.hardtanh(x, -0.5, 0.7, True),
    "hardtanh_": lambda x: F.hardtanh_(x, -0.5, 0.7),
    "relu6": nn.ReLU6(inplace=True),
    "clamp_": lambda x: x.clamp_(-0.5, 0.5),
    "torch.clamp_": lambda x: torch.clamp_(x, min=0),
    "clip_": lambda x: x.clip_(BOUND.to(x), None),
    "clamp_min_": lambda x: torch.clamp_min_(x, 0.25),
    "clamp_max_": lambda x: x.clamp_max_(0.25),
    "threshold": lambda x: F.threshold(x, 0.25, 3.0, True),
    "threshold_": lambda x: torch.threshold_(x, 0.25, 3.0),
    "abs_": lambda x: x.abs_(),
    "torch.abs_": torch.abs_,
    "rrelu": lambda x: seeded(lambda: F.rrelu(x, training=True, inplace=True)),
    "rrelu_": lambda x: seeded(lambda: torch.rrelu_(x, training=True)),
    "rrelu_ in evaluation": lambda x: F.rrelu_(x),
}
CALLS = {
    **POOLS,
    **PADS,
    **{name: (IMAGES, function) for name, function in ELEMENTWISE.items()},
    **{f"{name}, in place": (IMAGES, lambda x, f=f: f(x * 1)) for name, f in IN_PLACE.items()},
}
each_call = pytest.mark.parametrize(("shape", "function"), CALLS.values(), ids=CALLS)


def seeded(function):
    torch.manual_seed(7)
    return function()


def ours(function):
    def call(x):
        with fastgan.twice_differentiable():
            return function(x)

    return call


def orders(function, x, by=None):
    """The value, and the first three derivatives of a cube of it."""
    x = x.clone().requires_grad_()
    torch.manual_seed(1)
    found = [function(x)]
    for _ in range(3):
        found.append(torch.autograd.grad(found[-1].pow(3).sum(), x, create_graph=True)[0])
    return found


@each_call
def test_every_order_is_pytorchs(shape, function):
    x = torch.randn(shape, dtype=torch.float64)
    for actual, expected in zip(orders(ours(function), x), orders(function, x), strict=True):
        assert_close(actual, expected, order=0)


@each_call
def test_nothing_flows_to_the_input_through_its_choices(shape, function):
    x = torch.randn(shape, requires_grad=True)
    y = ours(function)(x)
    g = torch.randn_like(y).requires_grad_()
    (grad,) = torch.autograd.grad(y, x, g, create_graph=True)
    by_x, by_g = torch.autograd.grad(grad.square().sum(), (x, g), allow_unused=True)
    assert by_x is None
    assert by_g is not None


@each_call
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_results_and_gradients_are_pytorchs_to_the_bit(shape, function, dtype):
    x = torch.randn(shape).to(dtype)
    for actual, expected in zip(orders(ours(function), x)[:2], orders(function, x)[:2], strict=True):
        assert actual.dtype == expected.dtype
        assert torch.equal(actual, expected)


@each_call
def test_under_autocast_the_result_is_pytorchs(shape, function):
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.randn(shape).to(dtype)
        results = []
        for call in (ours(function), function):
            a = x.clone().requires_grad_()
            torch.manual_seed(1)
            with torch.autocast("cpu", torch.bfloat16):
                y = call(a)
            results.append((y, torch.autograd.grad(y.float().square().sum(), a)[0]))
        for actual, expected in zip(*results, strict=True):
            assert actual.dtype == expected.dtype
            assert torch.equal(actual, expected)


@pytest.mark.parametrize("name", [name for name in CALLS if CALLS[name][0] == IMAGES])
def test_channels_last_stays(name):
    _, function = CALLS[name]
    x = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)
    for actual, expected in zip(orders(ours(function), x)[:2], orders(function, x)[:2], strict=True):
        assert actual.stride() == expected.stride()
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_bounds_ties_and_no_numbers_have_pytorchs_gradients(name):
    special = torch.tensor([0.0, -0.0, 0.25, -0.25, 0.5, -0.5, float("inf"), -float("inf"), float("nan"), 0.7, 1.5])
    x = torch.cat([special, torch.randn(13)]).view(1, 3, 1, 8)
    by = torch.randn(1, 3, 1, 8)
    results = []
    for call in (ours(ELEMENTWISE[name]), ELEMENTWISE[name]):
        a = x.clone().requires_grad_()
        results.append(torch.autograd.grad(call(a), a, by)[0])
    assert torch.equal(*(result.nan_to_num(7.0) for result in results))


@pytest.mark.parametrize("name", IN_PLACE)
def test_in_place_writes_where_pytorch_does_and_refuses_what_it_does(name):
    function = IN_PLACE[name]
    made, written = torch.randn(2, 3, 4, 8).requires_grad_() * 1, []
    base = torch.randn(2, 6, 4, 8)
    for call in (ours(function), function):
        a = made.detach().clone().requires_grad_() * 1
        assert call(a) is a
        whole = base.clone().requires_grad_()
        half = (whole * 1)[:, 3:]
        view = call(half)
        assert view is half
        written.append([a, view, *torch.autograd.grad(half._base.square().sum(), whole)])
        leaf = torch.randn(2, 3, 4, 8, requires_grad=True)
        with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
            call(leaf)
    for actual, expected in zip(*written, strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda x: F.max_pool2d(x, 2, padding=3), RuntimeError),
        (lambda x: F.max_pool2d(x, (2, 2, 2)), RuntimeError),
        (lambda x: F.max_pool2d(x), TypeError),
        (lambda x: F.max_pool2d(x[0, 0], 2), RuntimeError),
        (lambda x: F.adaptive_avg_pool2d(x, (2, 2, 2)), (ValueError, RuntimeError)),
        (lambda x: F.pad(x, (9, 9, 1, 1), "reflect"), RuntimeError),
        (lambda x: F.pad(x, (9, 9, 1, 1), "circular"), RuntimeError),
        (lambda x: F.pad(x, (1, 1), "replicate"), NotImplementedError),
        (lambda x: F.pad(x, (1, 1, 1, 1), "mirror"), (RuntimeError, NotImplementedError)),
        (lambda x: F.hardtanh(x, 1.0, -1.0), ValueError),
        (lambda x: x.clamp(), (RuntimeError, ValueError)),
        (lambda x: torch.clamp(x, "0"), TypeError),
        (lambda x: F.softshrink(x, -1.0), RuntimeError),
        (lambda x: F.prelu(x, torch.ones(5)), RuntimeError),
        (lambda x: F.rrelu(x, 0.5, 0.1), RuntimeError),
        (lambda x: F.rrelu(x, 0.5, 0.1, True), RuntimeError),
        (lambda x: torch.maximum(x, torch.zeros(5)), RuntimeError),
        (lambda x: torch.maximum(x, 0.0), TypeError),
        (lambda x: F.threshold(x, 1.0), TypeError),
    ],
)
def test_what_pytorch_refuses_is_refused_in_its_words(call, error):
    x = torch.randn(2, 3, 7, 8, requires_grad=True)
    said = []
    for version in (call, ours(call)):
        with pytest.raises(error) as raised:
            version(x)
        said.append((type(raised.value), str(raised.value).split("\n")[0]))
    assert said[0] == said[1]


def test_what_is_not_a_plain_floating_input_goes_to_pytorch():
    class Tagged(torch.Tensor):
        pass

    x = torch.randn(2, 3, 8, 8)
    with fastgan.twice_differentiable():
        assert torch.equal(torch.clamp(torch.arange(5), max=2), torch.tensor([0, 1, 2, 2, 2]))
        out = torch.empty(2, 3, 8, 8)
        assert torch.abs(x, out=out) is out
        assert F.max_pool2d(x.to("meta").requires_grad_(), 2).shape == (2, 3, 4, 4)
        assert type(F.hardtanh(x.as_subclass(Tagged).requires_grad_())) is Tagged
        assert (x + 1j).requires_grad_().abs().grad_fn.name() == "AbsBackward0"
        assert F.hardtanh(x[:0].requires_grad_()).grad_fn.name() == "HardtanhBackward0"
        bound = torch.zeros(8, requires_grad=True)
        assert torch.maximum(x.requires_grad_(), bound).grad_fn.name() == "MaximumBackward0"
        assert torch.max(x).ndim == 0
        assert torch.max(x, 1)[1].dtype == torch.int64


def test_a_number_of_gradients_at_once():
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    for function in (lambda x: F.max_pool2d(x, 2), lambda x: F.pad(x, (1, 1, 1, 1), "reflect"), torch.abs):
        y = ours(function)(x)
        several = torch.randn(3, *y.shape)
        (actual,) = torch.autograd.grad(y, x, several, is_grads_batched=True)
        expected = torch.stack([torch.autograd.grad(function(x), x, by)[0] for by in several])
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("shape", [(5, 4), (2, 4, 7), (2, 4, 5, 6), (7,), ()], ids=str)
@pytest.mark.parametrize("slopes", [1, 4])
def test_prelus_weight_has_pytorchs_gradients(shape, slopes):
    if slopes == 4 and len(shape) < 2:
        pytest.skip("PyTorch takes one slope where there are no channels")
    x, weight = torch.randn(shape).double(), torch.linspace(-0.5, 1.5, slopes).double()
    results = []
    for prelu in (ours(lambda t: F.prelu(*t)), lambda t: F.prelu(*t)):
        a, w = x.clone().requires_grad_(), weight.clone().requires_grad_()
        y = prelu((a, w))
        grads = torch.autograd.grad(y.pow(3).sum(), (a, w), create_graph=True)
        results.append([y, *grads, *torch.autograd.grad(sum(g.pow(2).sum() for g in grads), (a, w))])
    for actual, expected in zip(*results, strict=True):
        assert_close(actual, expected, order=0)


class Between(nn.Module):
    """A function between the convolutions of a small critic."""

    def __init__(self, function):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.LeakyReLU(0.2), nn.Conv2d(8, 8, 3, padding=1))
        self.tail = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.LeakyReLU(0.2))
        self.head, self.function = nn.Linear(8 * 64, 1), copy.deepcopy(function)

    def forward(self, x):
        y = self.function(self.body(x))
        return self.head(self.tail(F.interpolate(y, (8, 8))).flatten(1))


BETWEEN = {
    **{name: function for name, function in ELEMENTWISE.items() if name not in ("prelu", "clamp by tensors")},
    **{name: function for name, (shape, function) in (POOLS | PADS).items() if shape == IMAGES},
    **{f"{name}, in place": function for name, function in IN_PLACE.items()},
    "PReLU": nn.PReLU(),
    "PReLU, a slope a channel": nn.PReLU(8),
    "prelu of constants": lambda x: F.prelu(x, torch.linspace(-0.5, 1.5, 8).to(x)),
    "max_pool3d": lambda x: F.max_pool3d(x[:, None], 2)[:, 0].repeat(1, 2, 1, 1),
    "area": lambda x: F.interpolate(x, scale_factor=0.6, mode="area"),
    **{
        f"{mode}, align_corners {corners}, antialias {smooth}": lambda x, m=mode, c=corners, s=smooth: F.interpolate(
            x, scale_factor=1.7, mode=m, align_corners=c, antialias=s
        )
        for mode in ("nearest", "nearest-exact", "bilinear", "bicubic")
        for corners, smooth in ((None, False), (True, False), (False, True))
        if mode.startswith("bi") or corners is None
    },
    "maxout": lambda x: x.unflatten(1, (4, 2)).amax(2).repeat(1, 2, 1, 1),
    "maxout by max": lambda x: x.unflatten(1, (4, 2)).max(2).values.repeat(1, 2, 1, 1),
    "max_unpool": lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2),
    "relu in place": lambda x: torch.relu_(x),
    "F.relu in place": lambda x: F.relu(x, inplace=True),
    "median of a max pool": lambda x: F.max_pool2d(x, 2) + x.flatten(2).median(2)[0][:, :, None, None],
}
SAMPLED = ("fractional_max_pool2d",)  # for three channels


@pytest.mark.parametrize("name", [name for name in BETWEEN if name not in SAMPLED])
def test_a_penalty_through_it_takes_four_forwards_and_is_pytorchs(name):
    critic, x = Between(BETWEEN[name]).double(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    twin = copy.deepcopy(critic)
    forward = count_flops(lambda: critic(x))
    torch.manual_seed(2)
    spent = count_flops(lambda: fastgan.gradient_penalty(critic, x, kind="r1").backward())
    assert spent <= 4.0 * forward

    a = x.clone().requires_grad_()
    torch.manual_seed(2)
    (g,) = torch.autograd.grad(twin(a).sum(), a, create_graph=True)
    (5 * g.square().flatten(1).sum(1).mean()).backward()
    for p, q in zip(critic.parameters(), twin.parameters(), strict=True):
        if p.grad is not None:
            assert_close(p.grad, q.grad, order=0)


def test_what_is_kept_of_an_input_is_a_byte_an_element():
    x = torch.randn(4, 8, 32, 32)

    def kept(function):
        def run():
            with fastgan.twice_differentiable():
                function(x.clone().requires_grad_() * 1).sum()

        return saved_bytes(run, [x])

    for name in ("hardtanh", "clamp", "threshold", "softshrink", "hardshrink", "abs", "Tensor.prelu, one slope"):
        assert kept(ELEMENTWISE[name]) <= x.numel() + 64, name
    for function in (lambda x: F.pad(x, (1, 1, 1, 1), "reflect"), lambda x: F.adaptive_avg_pool2d(x, 5)):
        assert kept(function) == 0
    assert kept(lambda x: F.max_pool2d(x, 2)) <= x.numel() // 4 * 8


def test_there_is_a_route_for_every_function_that_is_promised():
    promised = (
        *(getattr(F, f"{kind}_pool{n}d") for kind in ("max", "adaptive_max", "adaptive_avg") for n in (1, 2, 3)),
        *(F.pad, F.interpolate, F.hardtanh, F.relu6, F.threshold, F.softshrink, F.hardshrink, F.prelu, F.rrelu),
        *(torch.clamp, torch.clip, torch.abs, torch.maximum, torch.minimum, torch.prelu, torch.rrelu),
    )
    assert set(promised) <= set(ROUTES)
