"""Layers are converted on request, after a model's first training call."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastgan
from fastgan.convert import Difference, Report, Verification
from fastgan.launcher import session
from tests.convert.named_stand_ins import MinibatchStdLayer
from tests.launcher.training import MAKERS, Conditional, Discriminator, data, models


@pytest.fixture
def learned(monkeypatch):
    """The session of the last context, after its end."""
    sessions = []
    begin = session.begin
    monkeypatch.setattr(session, "begin", lambda settings: sessions.append(begin(settings)) or sessions[-1])
    return sessions


def normalized():
    sn = nn.utils.parametrizations.spectral_norm
    layers = sn(nn.Conv2d(3, 6, 3)), nn.ReLU(), MinibatchStdLayer(2), nn.Flatten(), sn(nn.Linear(7 * 36, 1))
    return nn.Sequential(*layers)


def test_layers_are_converted_on_request_after_the_first_batch(learned, capsys):
    def train():
        torch.manual_seed(1)
        d, g = normalized(), models()[1]
        return d, [loss.item() for loss, _ in MAKERS["wgan_gp"](d, g, 5)], torch.get_rng_state()

    plain, expected, state = train()
    with fastgan.enabled(always=True, convert=True):
        d, losses, after = train()
        assert type(d[2]) is not MinibatchStdLayer
    assert losses == pytest.approx(expected, rel=1e-3, abs=1e-4)
    assert torch.equal(state, after)
    assert type(d[2]) is MinibatchStdLayer  # as before, when the context has ended
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(d.state_dict()[name], value, rtol=1e-3, atol=1e-4)
    errors = capsys.readouterr().err
    assert learned[0].units[0].steps == 4
    assert "converted: Sequential: 2 x fused spectral norm, 1 x minibatch_stddev" in errors
    assert "not converted: Sequential: it has no layer that fastgan replaces" in errors  # the generator


def test_a_model_that_verify_finds_unequal_stays_as_it_is(learned, capsys, monkeypatch):
    unequal = Verification([Difference("gradient", 0.5, "0.weight", 1e-4)])
    monkeypatch.setattr(Report, "verify", lambda self, args, kwargs: unequal)
    d = normalized()
    kinds = [type(module) for module in d.modules()]
    with fastgan.enabled(convert=True):
        d(data()[0])
        assert [type(module) for module in d.modules()] == kinds
    assert "not converted: Sequential: gradient differs by 5.0e-01 at 0.weight" in capsys.readouterr().err


@pytest.mark.parametrize("named", [("labels",), ("images", "labels")])
def test_a_model_with_named_inputs_is_converted(named, learned, capsys):
    d = Conditional(Discriminator())
    nn.utils.parametrizations.spectral_norm(d.d.second)
    given = {"images": data()[0], "labels": torch.arange(4) % 3}
    args = [value for name, value in given.items() if name not in named]
    with fastgan.enabled(convert=True):
        d(*args, **{name: given[name] for name in named}).sum().backward()
    assert "  converted: Conditional: 1 x fused spectral norm" in capsys.readouterr().err
