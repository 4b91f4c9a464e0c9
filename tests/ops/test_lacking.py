"""Functions that PyTorch differentiates only once, inside a penalty: values and derivatives against formulas."""

from __future__ import annotations

import warnings
from math import inf

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastgan
from fastgan.ops import lacking
from fastgan.ops.lacking import distances, recurrent, segments

DOUBLE = {"dtype": torch.float64}


def second_order(function, *inputs):
    """Return the value, the first derivatives, and the second derivatives of a combination of them."""
    inputs = [t.detach().clone().requires_grad_(t.requires_grad) for t in inputs]
    wanted = [t for t in inputs if t.requires_grad]
    value = function(*inputs)
    torch.manual_seed(4)
    g = torch.randn(value.shape, dtype=value.dtype).requires_grad_()
    first = torch.autograd.grad(value, wanted, g, create_graph=True, allow_unused=True)
    scalar = sum((t.tanh() * torch.randn_like(t)).sum() for t in first if t is not None)
    second = torch.autograd.grad(scalar, [*wanted, g], allow_unused=True)
    return [torch.zeros(()) if t is None else t for t in (value, *first)], second


def rerouted(function):
    def call(*inputs):
        with fastgan.twice_differentiable():
            return function(*inputs)

    return call


def assert_alike(ours, theirs, *inputs, **close):
    found, expected = second_order(rerouted(ours), *inputs), second_order(theirs, *inputs)
    for mine, wanted in zip(found[0], expected[0], strict=True):
        torch.testing.assert_close(mine, wanted, **close)
    for mine, wanted in zip(found[1], expected[1], strict=True):
        a, b = (torch.zeros(()) if t is None else t for t in (mine, wanted))
        torch.testing.assert_close(a.expand_as(b) if a.ndim == 0 else a, b.expand_as(a) if b.ndim == 0 else b, **close)


def by_differences(x, y, p):
    difference = (x.unsqueeze(-2) - y.unsqueeze(-3)).abs()
    if p == inf:
        return difference.amax(-1)
    return difference.pow(p).sum(-1).pow(1 / p) if p != 2 else difference.square().sum(-1).sqrt()


SHAPES = [((4, 3), (5, 3)), ((2, 7, 3), (2, 1, 3)), ((2, 1, 30, 2), (3, 31, 2)), ((1, 1), (1, 1)), ((127, 5), (17, 5))]


@pytest.mark.parametrize("p", [1, 1.5, 2, 3, 4.0, inf])
@pytest.mark.parametrize("shapes", SHAPES)
def test_cdist(p, shapes):
    x, y = (torch.randn(shape, **DOUBLE).requires_grad_() for shape in shapes)
    close = {"rtol": 1e-8, "atol": 1e-9}
    assert_alike(lambda a, b: torch.cdist(a, b, p=p), lambda a, b: by_differences(a, b, p), x, y, **close)
    assert_alike(lambda a: torch.cdist(a, y.detach(), p), lambda a: by_differences(a, y.detach(), p), x, **close)
    assert_alike(lambda a: torch.cdist(x.detach(), a, p), lambda a: by_differences(x.detach(), a, p), y, **close)


@pytest.mark.parametrize("p", [1, 1.5, 3, inf])
def test_cdist_in_tiles(p, monkeypatch):
    monkeypatch.setattr(distances, "_TILE", 40)
    x, y = (torch.randn(2, n, 3, **DOUBLE).requires_grad_() for n in (11, 6))
    assert_alike(lambda a, b: torch.cdist(a, b, p), lambda a, b: by_differences(a, b, p), x, y, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(("p", "few"), [(1.0, 25), (2.0, 25), (2.0, 0), (3.0, 25)])
def test_cdist_to_the_third_order(p, few, monkeypatch):
    monkeypatch.setattr(distances, "_FEW", few)
    x, y = torch.randn(4, 3, **DOUBLE).requires_grad_(), torch.randn(3, 3, **DOUBLE).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: distances.cdist(a, b, p), (x, y))
    assert torch.autograd.gradgradcheck(lambda a, b: distances.cdist(a, b, p), (x, y))

    def first(a):
        (g,) = torch.autograd.grad(distances.cdist(a, y, p).square().sum(), a, create_graph=True)
        return g

    assert torch.autograd.gradgradcheck(first, (x,))


@pytest.mark.parametrize("p", [0, 0.5, 1, 1.5, 2, 3, inf])
@pytest.mark.parametrize("points", [5, 40])
def test_distances_of_points_to_themselves_are_finite(p, points):
    x = torch.randn(points, 3, **DOUBLE).requires_grad_()
    for ours in (
        lambda a: torch.cdist(a, a, p),
        lambda a: F.pairwise_distance(a, a * 1.0, p, eps=0.0) + a.sum(-1) ** 2,
    ):
        first, second = second_order(rerouted(ours), x)
        assert all(torch.isfinite(t).all() for t in (*first, *second) if t is not None)


def test_far_from_the_origin_float32_loses_nothing():
    x, y = ((torch.randn(n, 3) + 1000).requires_grad_() for n in (20, 25))
    found = second_order(rerouted(torch.cdist), x, y)[1]
    torch.manual_seed(4)
    g = torch.randn(20, 25)
    exact = [t.detach().double().requires_grad_() for t in (x, y)]
    cotangent = g.double().requires_grad_()
    first = torch.autograd.grad(by_differences(*exact, 2), exact, cotangent, create_graph=True)
    scalar = sum((t.tanh() * torch.randn(t.shape)).sum() for t in first)
    for mine, wanted in zip(found, torch.autograd.grad(scalar, [*exact, cotangent]), strict=True):
        assert (mine - wanted).norm() < 1e-4 * wanted.norm()


@pytest.mark.parametrize("p", [1, 2, 3, inf])
def test_pdist(p):
    x = torch.randn(6, 3, **DOUBLE).requires_grad_()
    i, j = torch.triu_indices(6, 6, 1)
    assert_alike(lambda a: F.pdist(a, p), lambda a: by_differences(a[i, None], a[j, None], p).flatten(), x)


@pytest.mark.parametrize("p", [1, 2, 3.5, inf])
@pytest.mark.parametrize("keepdim", [True, False])
def test_pairwise_distance(p, keepdim):
    x, y = (torch.randn(6, 5, **DOUBLE).requires_grad_() for _ in range(2))
    assert_alike(
        lambda a, b: F.pairwise_distance(a, b, p, keepdim=keepdim),
        lambda a, b: torch.linalg.vector_norm(a - b + 1e-6, p, -1, keepdim=keepdim),
        x,
        y,
    )
    torch.testing.assert_close(distances.pairwise_distance(x, y, p), F.pairwise_distance(x, y, p))


def test_distances_under_autocast_are_those_of_float32():
    x = torch.randn(6, 4, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16), fastgan.twice_differentiable():
        found = torch.cdist(x, x.flip(0) + 1)
    torch.testing.assert_close(found, torch.cdist(x, x.flip(0) + 1))


@pytest.mark.parametrize("function", [F.hardsigmoid, nn.Hardsigmoid(), nn.Hardsigmoid(inplace=True)])
def test_hardsigmoid(function):
    x = 4 * torch.randn(7, 5, **DOUBLE)
    x[0, 0] = 0
    x.requires_grad_()
    assert_alike(lambda a: function(a * 1), lambda a: (a + 3).clamp(0, 6) / 6, x)
    bounds = torch.tensor([-3.0, 3.0, inf, -inf], requires_grad=True)
    for slopes in (
        torch.autograd.grad(call(bounds * 1).sum(), bounds)[0] for call in (F.hardsigmoid, rerouted(function))
    ):
        assert not slopes.any()


def test_hardsigmoid_is_taken_in_one_pass():
    model = nn.Sequential(nn.Linear(5, 8), nn.Hardsigmoid(), nn.Linear(8, 1)).double()
    assert fastgan.explain_penalty(model, torch.randn(3, 5, **DOUBLE)) == "one pass"


BAGS = {
    "rows": (torch.randint(0, 9, (4, 3)), None, {}),
    "offsets": (torch.randint(0, 9, (11,)), torch.tensor([0, 3, 3, 7]), {}),
    "last offset": (torch.randint(0, 9, (11,)), torch.tensor([0, 3, 3, 11]), {"include_last_offset": True}),
    "padding": (torch.tensor([[0, 2, 2], [3, 8, 2]]), None, {"padding_idx": 2}),
    "padding from the end": (torch.tensor([[0, 2, 8], [3, 8, 2]]), None, {"padding_idx": -1}),
    "bounded": (torch.randint(0, 9, (4, 3)), None, {"max_norm": 1.0}),
}


@pytest.mark.parametrize("case", BAGS)
def test_embedding_bag_with_weights_of_its_own(case):
    index, offsets, options = BAGS[case]
    table = torch.randn(9, 4, **DOUBLE)
    factors = torch.randn(index.shape, **DOUBLE).requires_grad_()
    theirs = F.embedding_bag(index, table.clone(), offsets, mode="sum", per_sample_weights=factors.detach(), **options)

    def ours(f):
        return F.embedding_bag(index, table.clone(), offsets, mode="sum", per_sample_weights=f, **options)

    torch.testing.assert_close(rerouted(ours)(factors), theirs)
    x = torch.randn(index.shape, **DOUBLE).requires_grad_()
    value, second = second_order(rerouted(lambda a: ours(a.sin()) ** 2), x)
    assert torch.autograd.gradgradcheck(rerouted(lambda a: ours(a.sin()) ** 2), (x,))
    assert all(torch.isfinite(t).all() for t in (*value, *second))


def test_embedding_bag_as_a_module_trains_its_table():
    bag = nn.EmbeddingBag(9, 4, mode="sum").double()
    index, x = torch.randint(0, 9, (5, 3)), torch.randn(5, 3, **DOUBLE)
    results = []
    for call in (lambda f: bag(index, per_sample_weights=f), lambda f: (bag.weight[index] * f[..., None]).sum(1)):
        penalty = fastgan.gradient_penalty(lambda v, call=call: call(v.tanh()).square().sum(1), x, kind="r1")
        results.append((penalty, *torch.autograd.grad(penalty, bag.weight)))
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("reduce", ["sum", "mean", "max", "min", "prod"])
@pytest.mark.parametrize("by", ["lengths", "offsets"])
@pytest.mark.parametrize("initial", [None, 0.5])
@pytest.mark.parametrize("shape", [(9,), (9, 3)])
def test_segment_reduce(reduce, by, initial, shape):
    lengths = torch.tensor([4, 0, 3, 2])
    bounds = lengths if by == "lengths" else torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    if initial is None and reduce not in ("sum", "prod"):
        bounds = torch.tensor([4, 3, 2]) if by == "lengths" else torch.tensor([0, 4, 7, 9])
    x = torch.randn(shape, **DOUBLE).requires_grad_()

    def ours(a):
        return torch.segment_reduce(a, reduce, **{by: bounds}, initial=initial)

    torch.testing.assert_close(rerouted(ours)(x), ours(x))
    (mine,) = torch.autograd.grad(rerouted(ours)(x).square().sum(), x)
    (theirs,) = torch.autograd.grad(ours(x).square().sum(), x)
    torch.testing.assert_close(mine, theirs)
    assert torch.autograd.gradgradcheck(rerouted(lambda a: ours(a.sin()) ** 2), (x,))


@pytest.mark.parametrize("reduce", ["sum", "max"])
@pytest.mark.parametrize("by", ["lengths", "offsets"])
def test_segment_reduce_with_segments_of_each_sample(reduce, by):
    lengths = torch.tensor([[2, 3], [4, 1], [1, 4]])
    bounds = lengths if by == "lengths" else F.pad(lengths.cumsum(1), (1, 0))
    x = torch.randn(3, 5, 2, **DOUBLE).requires_grad_()

    def ours(a):
        return torch.segment_reduce(a, reduce, **{by: bounds}, axis=1)

    torch.testing.assert_close(rerouted(ours)(x), ours(x))
    assert torch.autograd.gradgradcheck(rerouted(lambda a: ours(a.sin()) ** 2), (x,))


@pytest.mark.parametrize(
    ("function", "shape"),
    {
        "cdist of no points": (lambda x: torch.cdist(x, x[:0].sin()), (4, 3)),
        "cdist of no features": (lambda x: torch.cdist(x, x.sin(), 3), (2, 4, 0)),
        "cdist of no samples": (lambda x: torch.cdist(x, x.sin(), 1), (0, 4, 3)),
        "pdist of one point": (F.pdist, (1, 3)),
        "pdist of no features": (lambda x: F.pdist(x, 1), (4, 0)),
        "pairwise_distance": (lambda x: F.pairwise_distance(x, x.sin()), (0, 3)),
        "hardsigmoid": (F.hardsigmoid, (0, 3)),
        "embedding_bag": (
            lambda x: F.embedding_bag(torch.ones(x.shape).long(), x.new_ones(3, 2), mode="sum", per_sample_weights=x),
            (0, 3),
        ),
        "segment_reduce": (lambda x: torch.segment_reduce(x, "sum", lengths=torch.tensor([0, 0])), (0, 3)),
        "attention": (lambda x: F.scaled_dot_product_attention(x, x[:, :, :0], x[:, :, :0].sin()), (2, 2, 4, 3)),
    }.values(),
)
def test_empty_inputs_have_derivatives_of_zero(function, shape):
    x = torch.randn(shape, **DOUBLE, requires_grad=True)
    torch.testing.assert_close(rerouted(function)(x), function(x.detach()))
    scale = torch.ones((), **DOUBLE, requires_grad=True)
    (slope,) = torch.autograd.grad(rerouted(function)(x * scale).sum(), x, create_graph=True)
    assert slope.shape == x.shape
    assert not slope.any()
    assert not torch.autograd.grad(slope.square().sum(), scale, materialize_grads=True)[0].any()


@pytest.mark.parametrize("theirs", list(recurrent.ROUTES))
def test_recurrent_layers_run_without_cudnn_for_that_call_alone(theirs, monkeypatch):
    """On a CPU, with a tensor whose ``is_cuda`` is true."""
    seen = []

    class OnCuda:
        is_cuda = True

    route = recurrent.without_cudnn(lambda *args: seen.append(torch.backends.cudnn.enabled))
    recurrent._warn_once.cache_clear()
    with pytest.warns(UserWarning, match="runs without cuDNN"):
        route(OnCuda())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        route(OnCuda())  # there is no second warning
    assert seen == [False, False]
    assert torch.backends.cudnn.enabled
    assert theirs in lacking.ROUTES


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="PyTorch has no linear_cross_entropy")
@pytest.mark.parametrize("retain", [False, True])
def test_linear_cross_entropy_in_chunks(retain):
    """PyTorch's chunks raise in a second backward, or forget that the first derivative depends on the logits."""
    x, weight = torch.randn(7, 6, **DOUBLE, requires_grad=True), torch.randn(5, 6, **DOUBLE, requires_grad=True)
    target = torch.randint(5, (7,))
    options = nn.LinearCrossEntropyOptions(allow_retain_graph=retain)
    assert_alike(
        lambda x, weight: F.linear_cross_entropy(x, weight, target, options=options),
        lambda x, weight: F.cross_entropy(x @ weight.mT, target),
        x,
        weight,
    )


@pytest.mark.parametrize("cls", [nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_recurrent_layers_in_a_penalty(cls):
    layer = cls(4, 3).double()

    def logits(x):
        out = layer(x)
        return (out[0] if isinstance(out, tuple) else out).square().flatten(1).sum(1)

    x = torch.randn(5, 4, **DOUBLE) if "Cell" in cls.__name__ else torch.randn(5, 6, 4, **DOUBLE)
    leaf = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(logits(leaf).sum(), leaf, create_graph=True)
    wanted = torch.autograd.grad(5 * g.flatten(1).square().sum(1).mean(), list(layer.parameters()), allow_unused=True)
    penalty = fastgan.gradient_penalty(logits, x, kind="r1")
    found = torch.autograd.grad(penalty, list(layer.parameters()), allow_unused=True)
    for mine, their in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, their)


@pytest.mark.small
def test_small_discriminators_have_them_too():
    class Points(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Linear(3, 4)

        def forward(self, x):
            h = self.embed(x)
            return F.hardsigmoid(torch.cdist(h, h.flip(1) + 1, p=1)).mean((1, 2))

    model, x = Points().double(), torch.randn(3, 5, 3, **DOUBLE)
    for _ in range(2):
        fastgan.gradient_penalty(model, x, kind="r1").backward()
    assert model.embed.weight.grad.norm() > 0


def test_the_errors_are_pytorchs():
    x = torch.randn(4, 3, requires_grad=True)
    for call in (
        lambda: torch.cdist(x, torch.randn(4, 2)),
        lambda: torch.cdist(x, x, p=-1.0),
        lambda: torch.segment_reduce(x, "sum", lengths=torch.tensor([1, 1])),
        lambda: F.embedding_bag(torch.zeros(2, 3, dtype=torch.long), x, mode="mean", per_sample_weights=x[:2]),
    ):
        with pytest.raises((RuntimeError, ValueError, NotImplementedError)) as theirs:
            call()
        with fastgan.twice_differentiable(), pytest.raises(type(theirs.value)) as ours:
            call()
        assert str(ours.value) == str(theirs.value)


def test_without_a_gradient_pytorchs_own_run(monkeypatch):
    monkeypatch.setattr(distances, "_Cdist", None)
    monkeypatch.setattr(segments, "_padded", None)
    x = torch.randn(4, 3)
    with fastgan.twice_differentiable():
        torch.cdist(x, x)
        torch.segment_reduce(x, "max", lengths=torch.tensor([1, 3]))
