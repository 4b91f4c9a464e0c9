"""Converted models evaluate, train, and can be copied, saved and reverted as before."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.nn.utils import spectral_norm as torch_hook

import fastgan
from fastgan import nn as fnn
from tests.convert.stand_ins import (
    IMAGES,
    MODELS,
    OTHERS,
    STYLES,
    ContiguousMinibatchStd,
    Discrimination,
    MinibatchStdLayer,
)
from tests.harness import assert_close, one_rank


def checkpoint_of(make):
    """Return the state of a model that has been trained a little."""
    torch.manual_seed(5)
    model = make()
    train(model, steps=3)
    return copy.deepcopy(model.state_dict())


def loaded(make, state):
    model = make()
    model.load_state_dict(state)
    return model


def train(model, steps, optimizer=None, one_forward=False):
    """The losses of a critic with a penalty every fourth step, in its place where a step has one forward."""
    optimizer = optimizer or torch.optim.Adam(model.parameters(), 2e-3)
    generator = torch.Generator().manual_seed(11)
    losses = []
    for step in range(steps):
        real, fake = torch.randn(2, 8, 3, 8, 8, generator=generator)
        penalty = fastgan.gradient_penalty(model, real, kind="r1", weight=0.5) if step % 4 == 0 else 0
        if one_forward:
            signs = torch.tensor([-1.0, 1.0]).repeat_interleave(8)[:, None]
            loss = penalty if step % 4 == 0 else F.softplus(signs * model(torch.cat([real + 0.5, fake]))).mean()
        else:
            loss = F.softplus(-model(real + 0.5)).mean() + F.softplus(model(fake)).mean() + penalty
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses)


@pytest.mark.parametrize("name", MODELS)
def test_a_converted_checkpoint_evaluates_and_trains_as_it_did(name):
    state = checkpoint_of(MODELS[name])
    model, converted = loaded(MODELS[name], state), loaded(MODELS[name], state)
    report = fastgan.convert(converted, mend=True)
    assert report.replaced
    assert_close(converted.eval()(IMAGES), model.eval()(IMAGES).double(), order=0)
    # weight_bar's own gradients are wrong after two forwards before one backward; a test below covers this.
    expected, actual = (train(m.train(), 32, one_forward=name == "weight_bar") for m in (model, converted))
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)
    for key, value in converted.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[key], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("name", MODELS)
def test_the_state_dict_keeps_its_keys_and_goes_both_ways(name):
    state = checkpoint_of(MODELS[name])
    converted = MODELS[name]()
    fastgan.convert(converted, mend=True)
    assert list(converted.state_dict()) == list(state)
    converted.load_state_dict(state)
    back = loaded(MODELS[name], converted.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(back.state_dict().values(), state.values(), strict=True))
    assert back.state_dict()._metadata == converted.state_dict()._metadata
    assert_close(back.eval()(IMAGES), converted.eval()(IMAGES).double(), order=0)


@pytest.mark.parametrize("name", MODELS)
def test_reverting_gives_back_classes_and_results(name):
    model = MODELS[name]()
    untouched = copy.deepcopy(model)
    classes = [type(m) for m in model.modules()]
    hooks = [type(h) for m in model.modules() for h in m._forward_pre_hooks.values()]
    tensors = [*model.parameters(), *model.buffers()]
    fastgan.convert(model, mend=True)
    assert fastgan.revert(model) is model
    assert [type(m) for m in model.modules()] == classes
    assert [type(h) for m in model.modules() for h in m._forward_pre_hooks.values()] == hooks
    assert all(a is b for a, b in zip([*model.parameters(), *model.buffers()], tensors, strict=True))
    assert not any("fastgan" in key for m in model.modules() for key in vars(m))
    assert torch.equal(model(IMAGES), untouched(IMAGES))


@pytest.mark.parametrize("name", MODELS)
def test_copies_and_pickles_of_a_converted_model_stay_converted(name):
    model = MODELS[name]()
    fastgan.convert(model, mend=True)
    model(IMAGES).sum().backward()
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)]
    expected = model.eval()(IMAGES)
    for other in copies:
        # PyTorch makes a class for each parametrized module, a copy's too.
        assert [type(m).__name__ for m in other.modules()] == [type(m).__name__ for m in model.modules()]
        assert torch.equal(other.eval()(IMAGES), expected)
        assert torch.equal(fastgan.revert(other)(IMAGES), fastgan.revert(copy.deepcopy(model))(IMAGES))


@pytest.mark.parametrize("name", MODELS)
def test_verify_compares_with_the_model_as_it_was_and_changes_nothing(name):
    model = MODELS[name]()
    report = fastgan.convert(model, mend=True)
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    verification = report.verify(IMAGES)
    assert verification.equal, str(verification)
    assert [d.kind for d in verification.differences] == ["output", "gradient", "penalty", "state"]
    assert "equal up to rounding" in str(verification)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), state.values(), strict=True))
    assert torch.equal(torch.get_rng_state(), random)


def test_verify_sees_a_wrong_replacement(monkeypatch):
    model = STYLES["u0, sv0"]()
    report = fastgan.convert(model)
    whole = fastgan.ops.spectral_norm
    monkeypatch.setattr(fastgan.ops, "spectral_norm", lambda *a, **k: [1.001 * w for w in whole(*a, **k)])
    verification = report.verify([IMAGES])
    assert not verification.equal
    assert "NOT EQUAL" in str(verification)
    with pytest.raises(TypeError, match="sample_inputs must be a tensor or begin with one, got str"):
        report.verify(["images"])


def test_an_optimizer_made_before_goes_on():
    model = STYLES["u0, sv0"]()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    train(model, 2, optimizer)
    before = model[0].weight.clone()
    fastgan.convert(model)
    train(model, 2, optimizer)
    assert not torch.equal(model[0].weight, before)
    assert len(optimizer.state) == len(list(model.parameters()))


def test_hooks_stay_and_fire():
    model = OTHERS["stddev"]()
    seen = []
    model[1].register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    fastgan.convert(model)
    model(IMAGES)
    assert seen == [(8, 5, 6, 6)]


def test_distributed_data_parallel_wraps_a_converted_model():
    model = nn.Sequential(*STYLES["u0, sv0"]()[:2], MinibatchStdLayer(4), nn.Flatten(), nn.LazyLinear(1))
    model(IMAGES)
    alone = copy.deepcopy(model)
    fastgan.convert(model)
    with one_rank():
        wrapped = nn.parallel.DistributedDataParallel(model)
        for net in (wrapped, alone):
            net(IMAGES).square().sum().backward()
        del wrapped, net
    for a, e in zip(model.parameters(), alone.parameters(), strict=True):
        assert_close(a.grad, e.grad.double(), order=1)


def test_a_conversion_leaves_wrong_gradients_as_they_are_and_says_so():
    state = checkpoint_of(STYLES["weight_bar"])
    model, converted = loaded(STYLES["weight_bar"], state), loaded(STYLES["weight_bar"], state)
    report = fastgan.convert(converted)
    assert not report.replaced
    wrong = [row for row in report.rows if "gradients are wrong after two forwards" in row.reason]
    assert [row.path for row in wrong] == ["0", "2", "4"]
    assert all("convert(model, mend=True)" in row.reason for row in wrong)
    assert torch.equal(train(converted, 8), train(model, 8))


def test_two_forwards_before_one_backward_are_right_in_a_mended_wrapper():
    # The wrapper itself overwrites the first forward's u and v before its backward reads them.
    converted = STYLES["weight_bar"]()
    exact = copy.deepcopy(converted)
    report = fastgan.convert(converted, mend=True)
    assert all("corrects its gradients" in row.reason for row in report.replaced)
    separate = []
    for x in (IMAGES, 2 * IMAGES):
        exact(x).sum().backward()
        separate.append([p.grad.clone() for p in exact.parameters() if p.requires_grad])
        exact.zero_grad()
    (converted(IMAGES).sum() + converted(2 * IMAGES).sum()).backward()
    for p, a, b in zip([p for p in converted.parameters() if p.requires_grad], *separate, strict=True):
        assert_close(p.grad, (a + b).double(), order=1)


def test_converting_draws_no_random_numbers_and_asks_no_hooks():
    model = nn.Sequential(*STYLES["sn_u, sn_sigma"](), MinibatchStdLayer(4), Discrimination(4, 3, 2))
    called = []
    for module in model:
        module.register_forward_pre_hook(lambda *_: called.append(1))
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    assert len(fastgan.convert(model).replaced) == 5
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), state.values(), strict=True))
    assert not called


def test_every_module_is_listed_with_what_became_of_it():
    model = nn.Sequential(
        torch_hook(nn.Conv2d(3, 4, 3)),
        nn.LeakyReLU(),
        nn.BatchNorm2d(4),
        MinibatchStdLayer(4),
        ContiguousMinibatchStd(4),
        fnn.MinibatchStdDev(),
        nn.Flatten(),
        parametrizations.spectral_norm(nn.Linear(252, 1)),
    )
    report = fastgan.convert(model)
    assert [(row.path, row.module) for row in report.rows] == [
        *(("", "Sequential"), ("0", "Conv2d"), ("1", "LeakyReLU"), ("2", "BatchNorm2d"), ("3", "MinibatchStdLayer")),
        *(("4", "ContiguousMinibatchStd"), ("5", "MinibatchStdDev"), ("6", "Flatten"), ("7", "Linear")),
    ]
    assert [row.path for row in report.replaced] == ["0", "3", "7"]
    reasons = {row.path: row.reason for row in report.rows}
    assert "one call per forward for 2 weights" in reasons["0"]
    assert "its calls are rerouted" in reasons["1"]
    assert reasons["5"] == "already a fastgan layer"
    assert "3 replaced, 6 unchanged" in str(report)
    assert len(str(report).splitlines()) == 12
    again = fastgan.convert(model)
    assert not again.replaced
    assert report.verify(IMAGES).equal


def test_what_was_fastgans_before_stays_so_after_a_reversion():
    model = fnn.utils.fuse_spectral_norm(STYLES["parametrization"]())
    assert not fastgan.convert(model).replaced
    fastgan.revert(model)
    assert len(model._forward_pre_hooks) == 1
    model.append(torch_hook(nn.Linear(1, 1)))
    (row,) = fastgan.convert(model).replaced
    assert row.path == "5"
    fastgan.revert(model)
    assert len(model._forward_pre_hooks) == 1
    assert isinstance(model[0].parametrizations.weight[0], fnn.utils.SpectralNorm)


@pytest.mark.parametrize("call", [fastgan.convert, fastgan.revert])
def test_what_is_no_module_is_refused(call):
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got list"):
        call([])
