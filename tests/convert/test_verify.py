"""verify: its comparisons, results that cannot be compared, and models that raise."""

from __future__ import annotations

import dataclasses
import threading
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import fastgan
from fastgan.ops.attention import multi_head
from tests.convert.stand_ins import IMAGES, BarNorm, BigConv


class Flat(nn.Module):
    """Features of images, for heads of many kinds."""

    def __init__(self):
        super().__init__()
        self.conv = parametrizations.spectral_norm(nn.Conv2d(3, 6, 3))
        self.head = nn.Linear(216, 1)

    def features(self, x):
        return F.leaky_relu(self.conv(x), 0.2).flatten(1)

    def forward(self, x):
        return self.head(self.features(x))


class Detached(Flat):
    def forward(self, x):
        return super().forward(x).detach()


class NoGrad(Flat):
    @torch.no_grad()
    def forward(self, x):
        return super().forward(x)


class Integers(Flat):
    def forward(self, x):
        return super().forward(x).gt(0).long()


class Nothing(Flat):
    def forward(self, x):
        super().forward(x)


class Raises(Flat):
    def forward(self, x):
        raise KeyError("labels")


class NoParameters(nn.Module):
    def forward(self, x):
        return x.square()


class NoSecond(Flat):
    def forward(self, x):
        return super().forward(F.hardsigmoid(self.conv(x))[:, :3].new_ones(1) * x) + F.hardsigmoid(x).sum()


class InPlaceOnInput(Flat):
    def forward(self, x):
        return super().forward(x.mul_(2))


class RefusesCopies(Flat):
    def __deepcopy__(self, memo):
        raise TypeError("one of a kind")


MISSING = {  # by kind, a part of the reason
    Detached: {"gradient": "depends on nothing", "penalty": "no output depends"},
    NoGrad: {"gradient": "depends on nothing", "penalty": "no output depends"},
    Integers: {"gradient": "no floating-point", "penalty": "no output depends"},
    Nothing: {"output": "returns no tensors", "gradient": "no floating-point", "penalty": "no output depends"},
    Raises: {"output": "KeyError", "gradient": "no output", "penalty": "no output", "state": "no output"},
    NoParameters: {"gradient": "no parameter", "penalty": "no parameter"},
    NoSecond: {"penalty": "hardsigmoid_backward"},
    InPlaceOnInput: {"penalty": "in-place"},
    RefusesCopies: dict.fromkeys(("output", "gradient", "penalty", "state"), "one of a kind"),
}


@pytest.mark.parametrize("kind", MISSING)
def test_what_a_model_has_no_result_for_is_left_out_with_the_reason(kind):
    model = kind()
    verification = fastgan.convert(model).verify(IMAGES)
    said = str(verification)
    assert verification.equal, said
    assert verification.missing.keys() == MISSING[kind].keys(), said
    for name, reason in MISSING[kind].items():
        assert reason in verification.missing[name]
        assert f"not compared: {name}, " in said
    assert ("nothing could be compared" in said) == ("output" in MISSING[kind] and len(MISSING[kind]) == 4)


def test_a_model_on_meta_is_not_compared():
    said = str(fastgan.convert(Flat().to("meta")).verify(IMAGES.to("meta")))
    assert "meta device" in said
    assert "nothing could be compared" in said


@dataclasses.dataclass
class Output:
    logits: torch.Tensor
    features: list
    loss: None = None


class InContainers(Flat):
    forms = (
        lambda y, h: (y, h),
        lambda y, h: [y, [h]],
        lambda y, h: {"logits": y, "features": {"first": h}},
        lambda y, h: Output(y, [h]),
        lambda y, h: (y, None, h > 0),
        lambda y, h: torch.complex(y, y),
    )

    def __init__(self, form):
        super().__init__()
        self.form = form

    def forward(self, x):
        h = self.features(x)
        return self.forms[self.form](self.head(h), h)


@pytest.mark.parametrize("form", range(len(InContainers.forms)))
def test_outputs_in_containers_are_compared(form):
    verification = fastgan.convert(InContainers(form)).verify(IMAGES)
    assert verification.equal, str(verification)
    assert not verification.missing


def test_a_wrong_output_in_a_container_is_seen(monkeypatch):
    model = InContainers(2)
    model.conv = BigConv(3, 6, 3)
    report = fastgan.convert(model)
    right = fastgan.ops.spectral_norm
    monkeypatch.setattr(fastgan.ops, "spectral_norm", lambda *a, **k: [1.001 * w for w in right(*a, **k)])
    assert "NOT EQUAL" in str(report.verify(IMAGES))


def test_a_converted_model_that_raises_where_the_original_does_not_is_not_equal(monkeypatch):
    report = fastgan.convert(nn.Sequential(BigConv(3, 5, 3)))

    def failing(*args, **kwargs):
        raise RuntimeError("out of order")

    monkeypatch.setattr(fastgan.ops, "spectral_norm", failing)
    verification = report.verify(IMAGES)
    assert not verification.equal
    assert "the converted model raised RuntimeError: out of order" in str(verification)


class Random(Flat):
    def forward(self, x):
        return super().forward(F.dropout(x + torch.randn_like(x), 0.3))


class Counting(Flat):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        self.calls += 1
        return super().forward(self.norm(x)) * self.calls


class OwnGenerator(Flat):
    """Its random numbers can't be drawn again."""

    def __init__(self):
        super().__init__()
        self.generator, self.lock = torch.Generator().manual_seed(0), threading.Lock()

    def forward(self, x):
        with self.lock:
            return super().forward(x + 0.1 * torch.randn(x.shape, generator=self.generator))


class GivesNaN(Flat):
    def forward(self, x):
        return super().forward(x) / torch.tensor([[float("nan")], [0.0], *[[1.0]] * (len(x) - 2)])


class OlderWeightNorm(Flat):
    def __init__(self):
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.head = nn.utils.weight_norm(self.head)


class Wrapped(Flat):
    def __init__(self):
        super().__init__()
        self.conv = BarNorm(nn.Conv2d(3, 6, 3))


@pytest.mark.parametrize("kind", [Random, Counting, OwnGenerator, GivesNaN, OlderWeightNorm, Wrapped])
def test_models_with_randomness_and_state_are_compared(kind):
    model = kind()
    model(IMAGES)  # leaves weights with a graph
    state = {key: value.clone() for key, value in model.state_dict().items()}
    verification = fastgan.convert(model).verify(IMAGES.clone())
    assert verification.equal, str(verification)
    assert not verification.missing
    assert all(torch.equal(a, state[key]) for key, a in model.state_dict().items() if "nan" not in str(a))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_compared(dtype):
    model = Flat().to(dtype)
    verification = fastgan.convert(model).verify(IMAGES.to(dtype))
    assert verification.equal, str(verification)


class Conditional(Flat):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(4, 216)

    def forward(self, x, labels, *, scale=1.0, extra=None):
        h = self.features(x["image"] if isinstance(x, dict) else x)
        return scale * (self.head(h) + (self.embed(labels) * h).sum(1, keepdim=True))


def test_labels_come_in_place_or_by_name():
    report = fastgan.convert(Conditional())
    labels = torch.arange(8) % 4
    for verification in (
        report.verify([IMAGES, labels]),
        report.verify(IMAGES, {"labels": labels, "scale": 2.0}),
        report.verify([{"image": IMAGES}, labels]),
    ):
        assert verification.equal, str(verification)
        assert not verification.missing
    assert "missing 1 required positional argument" in report.verify(IMAGES).missing["output"]


def test_the_figure_that_a_difference_is_held_to_is_named():
    torch.manual_seed(0)
    cancels = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 1))
    said = str(fastgan.convert(Flat()).verify(IMAGES))
    assert "tolerance" in said
    assert "sensitivity" not in said
    verification = fastgan.convert(cancels).verify(IMAGES)
    used = {d.basis for d in verification.differences}
    assert ("sensitivity: 8 times what the unconverted model changes by" in str(verification)) == (
        "sensitivity" in used
    )


class Attending(nn.Module):
    def __init__(self, always=False):
        super().__init__()
        self.always = always
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, 0.2, batch_first=True)
        self.head = nn.Linear(8, 1)

    def forward(self, x):
        h = self.layer(x.flatten(1, 2))
        if self.always:
            h = F.scaled_dot_product_attention(h, h, h, dropout_p=0.4)
        return self.head(h).mean(1)


def test_attention_that_draws_other_random_numbers_is_compared_in_evaluation(monkeypatch):
    said = str(fastgan.convert(Attending()).verify(IMAGES))
    assert said.endswith("equal up to rounding")
    assert ("evaluation" in said) == (torch.get_default_device().type != "cpu")
    monkeypatch.setattr(multi_head, "_runs_plain_form", lambda query: False)  # as on a GPU
    verification = fastgan.convert(Attending()).verify(IMAGES)
    assert verification.equal, str(verification)
    assert "compared in evaluation mode: dropout in attention draws other random numbers" in str(verification)
    said = str(fastgan.convert(Attending(always=True)).verify(IMAGES))
    assert "NOT EQUAL" not in said
    assert "not compared: output, dropout in attention draws other random numbers" in said


def test_attention_that_is_wrong_is_not_excused_by_its_dropout(monkeypatch):
    wrong = multi_head.scaled_dot_product_attention
    monkeypatch.setattr(multi_head, "_runs_plain_form", lambda query: False)
    monkeypatch.setattr(multi_head, "scaled_dot_product_attention", lambda *a, **k: 1.1 * wrong(*a, **k))
    assert str(fastgan.convert(Attending()).verify(IMAGES)).endswith("NOT EQUAL")
