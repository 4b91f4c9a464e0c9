"""Checkpoints of PyTorch's two forms of spectral norm, pruned and not, in part and under prefixes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import AveragedModel

from fastgan.nn.utils import convert_spectral_norm_state_dict as convert

X = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))


def model(form, pruned=True):
    torch.manual_seed(0)
    norm = parametrizations.spectral_norm if form == "parametrization" else nn.utils.spectral_norm
    net = nn.Sequential(norm(nn.Linear(5, 4)), nn.Sequential(norm(nn.Linear(4, 3))), nn.Linear(3, 2))
    if pruned:
        for layer in (net[0], net[1][0]):
            torch.manual_seed(1)
            where = (layer.parametrizations.weight, "original") if form == "parametrization" else (layer, "weight_orig")
            prune.random_unstructured(*where, 0.4)
        prune.random_unstructured(net[2], "weight", 0.4)  # pruned without a spectral norm
    return net


def other(form):
    return "hook" if form == "parametrization" else "parametrization"


@pytest.mark.parametrize("pruned", [False, True], ids=["whole", "pruned"])
@pytest.mark.parametrize("form", ["parametrization", "hook"])
def test_a_checkpoint_loads_into_the_other_form_and_computes_the_same(form, pruned):
    old, new = model(form, pruned).eval(), model(other(form), pruned).eval()
    with torch.no_grad():
        for p in old.parameters():
            p.mul_(1.3)
    new.load_state_dict(convert(old.state_dict(), other(form)))
    for net in (old, new):  # pruning under the older hook shows at the forward after the next
        net(X)
    torch.testing.assert_close(new(X), old(X))


@pytest.mark.parametrize("pruned", [False, True], ids=["whole", "pruned"])
@pytest.mark.parametrize("prefix", ["", "module.", "d.parametrizations_of.", "_orig_mod.module."])
@pytest.mark.parametrize("form", ["parametrization", "hook"])
def test_there_and_back_is_the_identity_under_any_prefix(form, prefix, pruned):
    state = {prefix + key: value for key, value in model(form, pruned).state_dict().items()}
    there = convert(state, other(form))
    assert set(there) == {prefix + key for key in model(other(form), pruned).state_dict()}
    back = convert(there, form)
    assert list(back) == list(state)
    assert all(back[key] is value for key, value in state.items())
    assert list(convert(state, form)) == list(state)


def test_the_state_of_an_average_of_models_converts():
    averaged = AveragedModel(model("parametrization", pruned=False))
    averaged.update_parameters(model("parametrization", pruned=False))
    there = convert(averaged.state_dict(), "hook")
    assert "module.0.weight_orig" in there
    assert "n_averaged" in there
    assert list(convert(there, "parametrization")) == list(averaged.state_dict())


def test_a_parameter_whose_own_name_ends_like_a_part():
    state = {"a.orig_orig": X, "a.orig_u": X, "a.orig_v": X, "a.step_u": X}
    there = convert(state, "parametrization")
    assert list(there) == [
        *("a.parametrizations.orig.original", "a.parametrizations.orig.0._u", "a.parametrizations.orig.0._v"),
        "a.step_u",
    ]
    assert list(convert(there, "hook")) == list(state)


@pytest.mark.parametrize("form", ["parametrization", "hook"])
@pytest.mark.parametrize("vector", ["_u", "_v"])
def test_a_part_of_a_state_that_lacks_one_vector_is_refused_by_name(form, vector):
    state = copy.copy(model(form, pruned=False).state_dict())
    missing = [key for key in state if key.startswith("1.") and key.endswith(vector)]
    for key in missing:
        del state[key]
    with pytest.raises(ValueError, match=missing[0].replace(".", r"\.")):
        convert(state, other(form))


def test_parameters_alone_are_refused_where_they_are_spectral_norms_and_kept_where_they_may_be_others():
    with pytest.raises(ValueError, match=r"0\.weight_orig but no 0\.weight_u and no 0\.weight_v"):
        convert(dict(model("hook", pruned=False).named_parameters()), "parametrization")
    orthogonal = parametrizations.orthogonal(nn.Linear(3, 3)).state_dict()
    assert list(convert(orthogonal, "hook")) == list(orthogonal)
    pruned = prune.random_unstructured(nn.Linear(3, 2), "weight", 0.5).state_dict()
    assert list(convert(pruned, "parametrization")) == list(pruned)
