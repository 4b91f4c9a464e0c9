"""Spectral norm of single modules, compared with PyTorch's, and checkpoints of both of its forms."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils import spectral_norm as torch_hook

from fastgan.nn import utils
from tests.harness import assert_close
from tests.nn.spectral_norm_problem import IMAGES, MODULES, assert_same, discriminator, inputs_of, pair, step


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize(("make", "shape"), MODULES.values(), ids=MODULES)
def test_modules_train_as_under_pytorch(make, shape, n, training):
    expected, actual = (m.train(training) for m in pair(make, n_power_iterations=n))
    x = inputs_of(shape)
    for _ in range(3):
        assert_same(actual, expected, x)


@pytest.mark.parametrize("dim", [None, 0, 1, -1])
def test_dim_means_what_it_means_in_pytorch(dim):
    expected, actual = pair(lambda: nn.Conv2d(3, 5, 2), dim=dim)
    assert_same(actual, expected, torch.randn(2, 3, 4, 4))


def test_the_state_dict_has_the_keys_of_pytorch_and_loads_both_ways():
    expected, actual = pair(lambda: nn.Conv2d(3, 5, 2))
    assert list(actual.state_dict()) == list(expected.state_dict())
    assert "parametrizations.weight.0._u" in actual.state_dict()
    actual(torch.randn(1, 3, 4, 4))
    expected.load_state_dict(actual.state_dict())
    assert_same(actual, expected, torch.randn(2, 3, 4, 4))


def test_a_new_module_starts_from_the_same_numbers_as_under_pytorch():
    states = []
    for normalize in (utils.spectral_norm, parametrizations.spectral_norm):
        torch.manual_seed(5)
        states.append(normalize(nn.Linear(9, 4)).state_dict())
    for a, b in zip(*(s.values() for s in states), strict=True):
        assert_close(a, b.double(), order=0)


def test_a_weight_of_one_dimension_is_divided_by_its_norm():
    expected, actual = pair(lambda: nn.BatchNorm2d(4))
    actual.weight.square().sum()
    assert_close(actual.weight, expected.weight.double(), order=0)
    assert list(actual.state_dict()) == list(expected.state_dict())


@pytest.mark.parametrize(
    ("options", "error"),
    [(dict(name="wait"), ValueError), (dict(n_power_iterations=0), ValueError), (dict(dim=4), IndexError)],
)
def test_bad_arguments_raise_what_pytorch_raises(options, error):
    messages = []
    for normalize in (utils.spectral_norm, parametrizations.spectral_norm):
        with pytest.raises(error) as raised:
            normalize(nn.Conv2d(3, 5, 2), **options)
        messages.append(str(raised.value))
    assert messages[0] == messages[1]


def test_remove_parametrizations_leaves_the_normalized_weight():
    expected, actual = (m.eval() for m in pair(lambda: nn.Linear(4, 3)))
    for module in (expected, actual):
        parametrize.remove_parametrizations(module, "weight")
    assert type(actual) is nn.Linear
    assert_close(actual.weight, expected.weight.double(), order=0)


@pytest.mark.parametrize(
    ("form", "fuse"),
    [(utils.spectral_norm, False), (utils.spectral_norm, True), (torch_hook, True)],
    ids=["each", "fused", "fused hooks"],
)
@pytest.mark.parametrize("moment", ["new", "after forward", "after backward", "after eval"])
def test_models_can_be_copied_and_pickled_at_any_time(moment, form, fuse):
    model = discriminator(form)
    if fuse:
        utils.fuse_spectral_norm(model)
    output = None
    if moment != "new":
        output = model(IMAGES)
    if moment == "after backward":
        output.sum().backward()
    if moment == "after eval":
        model.eval()(IMAGES)
        model.train()
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(saved, weights_only=False)]
    expected = step(copy.deepcopy(model), IMAGES)
    for other in copies:
        assert list(other.state_dict()) == list(model.state_dict())
        for a, b in zip(step(other, IMAGES), expected, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_modules_of_another_dtype_work(dtype):
    linear = utils.spectral_norm(nn.Linear(6, 4))
    expected = copy.deepcopy(linear).double()(torch.ones(1, 6, dtype=torch.float64))
    actual = linear.to(dtype)(torch.ones(1, 6, dtype=dtype))
    assert actual.dtype == dtype
    error = 8 * torch.finfo(dtype).eps  # six products and a sum, each rounded
    torch.testing.assert_close(actual.double(), expected, rtol=error, atol=error)


def test_autocast_multiplies_in_half_precision_and_normalizes_in_single():
    linear = utils.spectral_norm(nn.Linear(64, 8))
    with torch.autocast("cpu", torch.bfloat16):
        output = linear(torch.randn(2, 64))
        assert linear.weight.dtype == torch.float32
    assert output.dtype == torch.bfloat16


def test_a_checkpoint_of_either_form_loads_into_the_other():
    hook, new = discriminator(torch_hook), discriminator(parametrizations.spectral_norm)
    for _ in range(20):  # both orders of iteration converge to the same u and v
        hook(IMAGES)
    new.load_state_dict(utils.convert_spectral_norm_state_dict(hook.state_dict(), "parametrization"))
    assert_close(new.eval()(IMAGES), hook.eval()(IMAGES).double(), order=0)
    new.train()(IMAGES)
    hook.load_state_dict(utils.convert_spectral_norm_state_dict(new.state_dict(), "hook"))
    assert_close(new.eval()(IMAGES), hook.eval()(IMAGES).double(), order=0)


@pytest.mark.parametrize("form", ["parametrization", "hook"])
def test_converting_there_and_back_is_the_identity(form):
    model = discriminator(torch_hook if form == "hook" else parametrizations.spectral_norm)
    state = model.state_dict()
    there = utils.convert_spectral_norm_state_dict(state, "hook" if form == "parametrization" else "parametrization")
    back = utils.convert_spectral_norm_state_dict(there, form)
    assert list(back) == list(state)
    assert not set(there) & {k for k in state if "bias" not in k}
    assert back._metadata == state._metadata


def test_a_checkpoint_that_lacks_a_vector_is_refused_by_name():
    state = discriminator(torch_hook).state_dict()
    del state["0.weight_v"]
    with pytest.raises(ValueError, match=r"0\.weight_orig but no 0\.weight_v"):
        utils.convert_spectral_norm_state_dict(state, "parametrization")
    with pytest.raises(ValueError, match="form must be"):
        utils.convert_spectral_norm_state_dict(state, "old")
