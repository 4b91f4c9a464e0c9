"""The outputs of a discriminator that count as logits, and their selection by select=."""

from __future__ import annotations

import copy
from collections import OrderedDict, namedtuple

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastgan
from fastgan.nn import GradientPenalty
from tests.harness import assert_close

N = 6
Judgment = namedtuple("Judgment", ["logits", "features"])


class Heads(nn.Module):
    """Several heads on a convolution's features (N, 8, 8, 8), returned as ``form`` builds them."""

    def __init__(self, *heads, form=tuple):
        super().__init__()
        self.body, self.heads, self.form = nn.Conv2d(3, 8, 3, 2, 1), nn.ModuleList(heads), form

    def forward(self, x):
        features = F.leaky_relu(self.body(x), 0.2)
        return self.form([head(features) for head in self.heads])


def patches(size, channels=1):
    return nn.Sequential(nn.AdaptiveAvgPool2d(size), nn.Conv2d(8, channels, 1))


def row(width):
    return nn.Sequential(nn.Flatten(), nn.Linear(512, width))


def images():
    return torch.randn(N, 3, 16, 16, dtype=torch.float64)


def r1(discriminator, x, summed):
    """Compute the penalty with PyTorch, from the sum of the outputs that ``summed`` selects."""
    x = x.detach().requires_grad_()
    total = sum(output.sum() for output in summed(discriminator(x)))
    (grad,) = torch.autograd.grad(total, x, create_graph=True)
    return 5 * grad.square().sum((1, 2, 3)).mean()


def gradients(discriminator, loss):
    discriminator.zero_grad()
    loss.backward()
    return torch.cat(
        [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in discriminator.parameters()]
    )


def by_logits_and_penalty(discriminator, x, **options):
    returned, penalty = fastgan.logits_and_penalty(discriminator, x, **options)
    assert_same_form(returned, discriminator(x))
    return penalty


def by_logits(discriminator, x, **options):
    x = x.requires_grad_()
    with fastgan.twice_differentiable():
        returned = discriminator(x)
    return fastgan.penalty_from_logits(returned, x, **options)


CALLS = {
    "gradient_penalty": lambda D, x, **options: fastgan.gradient_penalty(D, x, kind="r1", **options),
    "logits_and_penalty": by_logits_and_penalty,
    "penalty_from_logits": by_logits,
    "GradientPenalty": lambda D, x, **options: GradientPenalty("r1", **options)(D, x),
}
ASKING = {**CALLS, "explain_penalty": fastgan.explain_penalty}


def assert_same_form(actual, expected):
    assert type(actual) is type(expected)
    if isinstance(expected, torch.Tensor):
        assert_close(actual, expected, order=0)
    elif isinstance(expected, dict):
        assert list(actual) == list(expected)
        for key, part in expected.items():
            assert_same_form(actual[key], part)
    else:
        for a, e in zip(actual, expected, strict=True):
            assert_same_form(a, e)


def assert_penalty(call, discriminator, summed, **options):
    discriminator, x = discriminator.double(), images()
    exact = copy.deepcopy(discriminator)
    actual, expected = call(discriminator, x, **options), r1(exact, x, summed)
    assert_close(actual, expected, order=1)
    assert_close(gradients(discriminator, actual), gradients(exact, expected), order=2)


ONE_TENSOR = {
    "a number a sample": nn.Sequential(row(1), nn.Flatten(0)),
    "a column": row(1),
    "one pixel": patches(1),
    "several logits": row(5),
    "patches": patches(4),
    "patches of several channels": patches(3, 4),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("head", ONE_TENSOR.values(), ids=ONE_TENSOR)
def test_one_tensor_with_a_row_a_sample_is_logits(head, call):
    assert_penalty(call, Heads(head, form=lambda outputs: outputs[0]), lambda output: [output])
    assert_penalty(call, Heads(head), lambda outputs: outputs)  # a tuple of one


SCALES = {
    "patches of two scales": [patches(8), patches(4)],
    "patches of three scales": [patches(8), patches(4), patches(2)],
    "patches of one size": [patches(4), patches(4)],
    "sequences of two scales": [
        nn.Sequential(nn.Flatten(2), nn.Conv1d(8, 1, 3)),
        nn.Sequential(nn.Flatten(2), nn.Conv1d(8, 1, 4, 4)),
    ],
    "periods": [row(20), row(21)],
    "periods of which two are equally long": [row(20), row(20), row(21)],
}


@pytest.mark.parametrize("form", [tuple, list])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("heads", SCALES.values(), ids=SCALES)
def test_scales_and_periods_are_summed(heads, call, form):
    assert_penalty(call, Heads(*copy.deepcopy(heads), form=form), lambda outputs: outputs)


def then(*more):
    """Outputs of which the later ones are computed from the first."""
    return lambda outputs: (*outputs, *(function(outputs[0]) for function in more))


AMBIGUOUS = {
    "patches and a class head": Heads(patches(4), row(10)),
    "patches and one attribute": Heads(patches(4), row(1)),
    "patches and one attribute of a convolution": Heads(patches(4), patches(1)),
    "a logit and classes": Heads(row(1), row(10)),
    "a flat logit and classes": Heads(nn.Sequential(row(1), nn.Flatten(0)), row(10)),
    "a logit and one attribute": Heads(row(1), row(1)),
    "two rows of one length": Heads(row(10), row(10)),
    "flat patches and one pixel": Heads(row(25), patches(1)),
    "patches of several channels": Heads(patches(4, 3), patches(2, 3)),
    "patches of other channels": Heads(patches(4), patches(2, 3)),
    "features": Heads(nn.Identity(), patches(4)),
    "a scalar loss": Heads(row(1), form=then(lambda logits: logits.square().mean())),
    "probabilities of the same patches": Heads(patches(4), form=then(torch.sigmoid)),
    "the same patches twice": Heads(patches(4), form=lambda outputs: outputs * 2),
    "smaller patches made from the first": Heads(patches(4), form=then(lambda logits: F.avg_pool2d(logits, 2))),
    "another number of rows": Heads(patches(4), form=then(lambda logits: logits[: N // 2])),
    "a nested list": Heads(patches(4), patches(2), form=lambda outputs: [[output] for output in outputs]),
    "features and logits of a scale": Heads(patches(8), patches(4), form=lambda outputs: [outputs]),
    "a dictionary": Heads(row(1), form=lambda outputs: {"logits": outputs[0]}),
    "nothing beside": Heads(row(1), form=lambda outputs: (outputs[0], None)),
}


def shapes(output):
    if isinstance(output, torch.Tensor):
        return [tuple(output.shape)]
    parts = output.values() if isinstance(output, dict) else output or ()
    return [shape for part in parts for shape in shapes(part)]


@pytest.mark.parametrize("call", ASKING.values(), ids=ASKING)
@pytest.mark.parametrize("discriminator", AMBIGUOUS.values(), ids=AMBIGUOUS)
def test_what_need_not_be_a_logit_is_refused_with_its_shapes_and_the_cure(discriminator, call):
    with pytest.raises(ValueError, match="select the logits with select=") as raised:
        call(discriminator.double(), images())
    for shape in shapes(discriminator(images())):
        assert str(shape) in str(raised.value)


NOT_ROWS = {
    "pairs packed in a row": (lambda x: x.reshape(N // 2, -1).sum(1, keepdim=True), r"\(3, 1\)"),
    "time first": (lambda x: x.flatten(2).sum(1).T, r"\(256, 6\)"),
    "a scalar": (lambda x: x.mean(), r"\(\)"),
    "rows of patches": (lambda x: x.sum(1).reshape(-1, 1), r"\(1536, 1\)"),
    "one for the batch": (lambda x: x.mean().reshape(1), r"\(1,\)"),
}


@pytest.mark.parametrize("call", ASKING.values(), ids=ASKING)
@pytest.mark.parametrize(("function", "shape"), NOT_ROWS.values(), ids=NOT_ROWS)
def test_rows_that_are_not_samples_are_refused(function, shape, call):
    with pytest.raises(ValueError, match=f"must have one row for each of the 6 inputs, got {shape}: .*select="):
        call(function, images())
    with pytest.raises(ValueError, match=f"must have one row for each of the 6 .*{shape}"):
        call(lambda x: [x, function(x)], images(), select=1)


def test_what_is_no_tensor_at_all_is_a_wrong_type():
    for returned in (None, "logits", [], 3.0):
        with pytest.raises(TypeError, match="must return a tensor or a sequence of tensors"):
            fastgan.gradient_penalty(lambda x, returned=returned: returned, images(), kind="r1")


def nested(outputs):
    return [[features, logits] for features, logits in (outputs[:2], outputs[2:])]


SELECTED = {
    "an index": (Heads(row(1), row(10)), 0, lambda outputs: [outputs[0]]),
    "an index from the end": (Heads(nn.Identity(), row(1)), -1, lambda outputs: [outputs[1]]),
    "a list": (Heads(row(1), row(10), form=list), 1, lambda outputs: [outputs[1]]),
    "several": (Heads(row(1), patches(4), row(10)), (0, 1), lambda outputs: outputs[:2]),
    "several of other ranks": (Heads(row(25), patches(1)), [0, 1], lambda outputs: outputs),
    "a function": (Heads(row(1), row(10)), lambda outputs: outputs[0], lambda outputs: [outputs[0]]),
    "a function of one tensor": (
        Heads(row(6), form=lambda outputs: outputs[0]),
        lambda logits: logits[:, :2],
        lambda logits: [logits[:, :2]],
    ),
    "rows of patches": (
        Heads(patches(4), form=lambda outputs: outputs[0].reshape(-1, 1)),
        lambda logits: logits.view(N, -1),
        lambda logits: [logits],
    ),
    "a key": (
        Heads(row(1), row(10), form=lambda outputs: {"logits": outputs[0], "classes": outputs[1]}),
        "logits",
        lambda outputs: [outputs["logits"]],
    ),
    "keys": (
        Heads(row(1), row(10), row(3), form=lambda outputs: OrderedDict(zip("abc", outputs, strict=True))),
        ("a", "c"),
        lambda outputs: [outputs["a"], outputs["c"]],
    ),
    "a field of a named tuple": (
        Heads(row(1), row(10), form=Judgment._make),
        lambda judgment: judgment.logits,
        lambda judgment: [judgment.logits],
    ),
    "the name of a field": (
        Heads(row(1), row(10), form=Judgment._make),
        "logits",
        lambda judgment: [judgment.logits],
    ),
    "a list of scales": (
        Heads(patches(8), patches(4), row(10), form=lambda outputs: (list(outputs[:2]), outputs[2])),
        0,
        lambda outputs: outputs[0],
    ),
    "lists of periods by keys": (
        Heads(row(20), row(21), row(1), form=lambda outputs: {"periods": outputs[:2], "whole": outputs[2]}),
        ("periods", "whole"),
        lambda outputs: [*outputs["periods"], outputs["whole"]],
    ),
    "the last of each scale": (
        Heads(nn.Identity(), patches(4), nn.Identity(), patches(2), form=nested),
        lambda scales: [scale[-1] for scale in scales],
        lambda scales: [scales[0][1], scales[1][1]],
    ),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize(("discriminator", "select", "summed"), SELECTED.values(), ids=SELECTED)
def test_select_chooses_and_everything_is_returned(discriminator, select, summed, call):
    assert_penalty(call, copy.deepcopy(discriminator), summed, select=select)


@pytest.mark.parametrize("name", SELECTED)
def test_explain_penalty_takes_select(name):
    discriminator, select, _ = SELECTED[name]
    assert fastgan.explain_penalty(discriminator.double(), images(), select=select).startswith("one pass")


def test_a_loss_of_everything_that_was_returned_and_a_penalty_of_the_selected_are_exact():
    discriminator, x = Heads(row(1), row(10)).double(), images()
    exact, classes = copy.deepcopy(discriminator), torch.arange(N) % 10

    def loss(outputs):
        return F.softplus(-outputs[0]).mean() + F.cross_entropy(outputs[1], classes)

    returned, penalty = fastgan.logits_and_penalty(discriminator, x, kind="r1", select=0)
    expected = loss(exact(x)) + r1(exact, x, lambda outputs: [outputs[0]])
    assert_close(gradients(discriminator, loss(returned) + penalty), gradients(exact, expected), order=2)


BAD_SELECTIONS = {
    "out of range": (5, ValueError, r"no output 5, got \[\(6, 1\), \(6, 10\)\]"),
    "no such key": ("logits", ValueError, "no output 'logits'"),
    "twice": ((0, 0), ValueError, "the same output twice"),
    "the same from both ends": ((0, -2), ValueError, "the same output twice"),
    "nothing": ((), TypeError, "select must be an index, a key, a tuple of them or a function"),
    "a float": (0.5, TypeError, r"got 0\.5"),
    "a boolean": (True, TypeError, "got True"),
    "a function that returns none": (
        lambda outputs: None,
        ValueError,
        "must return a tensor or a flat list .*, got NoneType",
    ),
    "a function that returns all, nested": (
        lambda outputs: [outputs],
        ValueError,
        r"must return a tensor or a flat list .*, got \[\[\(6, 1\), \(6, 10\)\]\] from",
    ),
}


@pytest.mark.parametrize("call", ASKING.values(), ids=ASKING)
@pytest.mark.parametrize(("select", "error", "message"), BAD_SELECTIONS.values(), ids=BAD_SELECTIONS)
def test_bad_selections_are_refused(select, error, message, call):
    with pytest.raises(error, match=message):
        call(Heads(row(1), row(10)).double(), images(), select=select)


@pytest.mark.parametrize("call", ASKING.values(), ids=ASKING)
def test_a_list_that_an_index_selects_is_judged_as_if_it_were_returned(call):
    discriminator = Heads(nn.Identity(), patches(4), row(1), form=lambda outputs: (list(outputs[:2]), outputs[2]))
    with pytest.raises(ValueError, match=r"\[\(6, 8, 8, 8\), \(6, 1, 4, 4\)\], that may not be logits"):
        call(discriminator.double(), images(), select=0)


@pytest.mark.parametrize("select", [None, lambda logits: logits], ids=["all", "a function"])
@pytest.mark.parametrize("call", ASKING.values(), ids=ASKING)
def test_complex_logits_are_refused(call, select):
    net = nn.Sequential(nn.Flatten(), nn.Linear(768, 1)).double()
    with pytest.raises(TypeError, match=r"logits must be real, got torch\.complex128"):
        call(lambda x: torch.fft.fft(net(x), dim=0), images(), select=select)


@pytest.mark.parametrize("call", ASKING.values(), ids=ASKING)
def test_an_index_into_one_tensor_would_be_a_sample(call):
    with pytest.raises(ValueError, match=r"select=0 selects among several outputs, .* returned one, \(6, 1\)"):
        call(nn.Sequential(nn.Flatten(), nn.Linear(768, 1)).double(), images(), select=0)


@pytest.mark.small
def test_small_discriminators_are_judged_alike():
    discriminator = Heads(row(1), row(10)).double()
    with pytest.raises(ValueError, match="select="):
        fastgan.gradient_penalty(discriminator, images(), kind="r1")
    assert_penalty(CALLS["gradient_penalty"], discriminator, lambda outputs: [outputs[0]], select=0)
