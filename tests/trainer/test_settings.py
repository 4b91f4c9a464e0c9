"""The types of settings in JSON files, and the settings that a resumed run may change."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from fastgan.trainer.config import PRESETS, OptimConfig, TrainConfig
from fastgan.trainer.errors import RunFolderError
from fastgan.trainer.game.schedule import rate_factor
from fastgan.trainer.loop import Trainer
from fastgan.trainer.report.page import changes_of


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"steps": "five"}, "steps must be a whole number, got 'five'"),
        ({"steps": 3.5}, "steps must be a whole number, got 3.5"),
        ({"steps": True}, "steps must be a whole number, got True"),
        ({"seed": None}, "seed must be a whole number, got None"),
        ({"minutes": "1"}, "minutes must be a number or null, got '1'"),
        ({"data": 5}, "data must be text or null, got 5"),
        ({"dataset": "cats"}, "dataset must be one of fashion-mnist, "),
        ({"image_size": [3]}, "image_size must be a whole number or text, got"),
        ({"conditional": "yes"}, "conditional must be true or false, got 'yes'"),
        ({"width": "8"}, "width must be a whole number, got '8'"),
        ({"optim": {"loss": "hing"}}, "loss must be one of non-saturating, "),
        ({"optimizer": "sgd"}, "optimizer must be one of adam, "),
        ({"betas": 0.5}, "betas must be a list of 2 values, each a number, got 0.5"),
        ({"betas": [0.5]}, "betas must be a list of 2 values, each a number"),
        ({"channels": True}, "channels must be one of 1, 3, 4, got True"),
    ],
)
def test_a_value_of_the_wrong_type_is_named_with_what_it_must_be(tmp_path, values, says):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(values))
    with pytest.raises(RunFolderError) as caught:
        TrainConfig.load(file, PRESETS["folder"][1])
    assert str(caught.value).startswith(f"{file} is not a valid configuration: {says}")


@pytest.mark.parametrize(
    ("dataset", "values", "says"),
    [
        ("ring8", {"data": "cats"}, "ring8 is computed and reads no files: leave out data"),
        ("discs", {"crop": "none", "image_size": 64}, "leave out image_size, crop"),
        ("emoji", {"crop": "none", "channels": 4}, "leave out crop (for folder only)"),
    ],
)
def test_a_setting_that_the_data_would_ignore_is_refused(tmp_path, dataset, values, says):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(values))
    with pytest.raises(RunFolderError) as caught:
        TrainConfig.load(file, PRESETS[dataset][1])
    assert says in str(caught.value)


def test_whole_numbers_and_lists_are_numbers_and_tuples(tmp_path):
    file = tmp_path / "config.json"
    file.write_text('{"penalty_weight": 2, "betas": [0, 0.9], "minutes": null, "data": "cats", "image_size": "16x32"}')
    config = TrainConfig.load(file, PRESETS["folder"][1])
    assert (config.optim.penalty_weight, config.optim.betas, str(config.data)) == (2, (0, 0.9), "cats")


@pytest.fixture
def bare(monkeypatch):
    for name in ("save_losses", "save_samples"):
        monkeypatch.setattr(f"fastgan.trainer.report.pictures.{name}", lambda *args: None)


def resumed(config: TrainConfig, steps: int, **changes: object) -> Trainer:
    optim = dataclasses.replace(config.optim, **changes)
    trainer = Trainer(dataclasses.replace(config, steps=steps, optim=optim, resume=True))
    trainer.train()
    return trainer


@pytest.mark.usefixtures("bare")
def test_a_resumed_run_may_change_its_learning_rate_and_says_so(ring8_config, capsys):
    Trainer(dataclasses.replace(ring8_config, steps=4)).train()
    trainer = resumed(ring8_config, 6, g_lr=1e-5, betas=(0.1, 0.9), ema_decay=0.5)
    assert [group["lr"] for group in trainer.gan.g_adam.param_groups] == [1e-5]
    assert [group["lr"] for group in trainer.gan.d_adam.param_groups] == [ring8_config.optim.d_lr]
    assert trainer.gan.g_adam.param_groups[0]["betas"] == (0.1, 0.9)
    assert trainer.gan.ema.decay == 0.5
    before = ring8_config.optim.g_lr
    assert f"from step 4 on: g_lr: {before} -> 1e-05, betas: " in capsys.readouterr().out
    assert f"| changed | from step 4 on: g_lr: {before} -> 1e-05, betas: " in trainer.run.report.read_text()

    again = resumed(TrainConfig.load(trainer.run.config), 8)  # without a flag, as on the command line
    assert again.gan.g_adam.param_groups[0]["lr"] == 1e-5
    assert "from step" not in capsys.readouterr().out
    assert again.run.report.read_text().count("| changed |") == 1


@pytest.mark.usefixtures("bare")
def test_a_change_on_resuming_is_the_same_as_the_setting_from_the_start_of_the_steps(ring8_config):
    """The optimizers' moments stay, and only later steps use the new rate."""
    Trainer(dataclasses.replace(ring8_config, steps=4)).train()
    one = resumed(ring8_config, 6, g_lr=1e-5).gan.generator.state_dict()
    other = Trainer(dataclasses.replace(ring8_config, name="other", steps=6))
    while other.step < 6:
        if other.step == 4:
            other.gan.g_adam.param_groups[0]["lr"] = 1e-5
        other.gan.step()
        other.step += 1
    assert all(map(torch.equal, one.values(), other.gan.generator.state_dict().values()))


def test_the_learning_rates_rise_and_fall_linearly():
    assert [rate_factor(step, 4, None) for step in (0, 1, 3, 4, 100)] == [0.25, 0.5, 1, 1, 1]
    assert [rate_factor(step, None, (10, 20)) for step in (0, 10, 15, 19, 20, 30)] == [1, 1, 0.5, 0.1, 0, 0]
    assert rate_factor(2, 4, (0, 4)) == 0.375


@pytest.mark.usefixtures("bare")
def test_a_schedule_is_the_rates_set_by_hand_and_goes_on_after_resuming(ring8_config, capsys):
    optim = dataclasses.replace(ring8_config.optim, lr_warmup=2, lr_decay=(4, 8))
    config = dataclasses.replace(ring8_config, optim=optim)
    Trainer(dataclasses.replace(config, steps=5)).train()
    one = resumed(TrainConfig.load(config.folder / "config.json"), 7)
    assert "from step" not in capsys.readouterr().out
    assert "rising over 2 steps, falling to zero from step 4 to 8" in one.run.report.read_text()
    other = Trainer(dataclasses.replace(ring8_config, name="other", steps=7)).gan
    for factor in (0.5, 1, 1, 1, 1, 0.75, 0.5):
        other.g_adam.param_groups[0]["lr"] = factor * optim.g_lr
        other.d_adam.param_groups[0]["lr"] = factor * optim.d_lr
        other.step()
    assert all(map(torch.equal, one.gan.generator.state_dict().values(), other.generator.state_dict().values()))
    resumed(config, 8, lr_decay=None)
    assert "from step 7 on: lr_decay: [4, 8] -> None" in capsys.readouterr().out


@pytest.mark.usefixtures("bare")
def test_a_run_that_has_reached_its_end_says_what_moves_it(ring8_config, capsys):
    Trainer(dataclasses.replace(ring8_config, steps=4)).train()
    assert resumed(ring8_config, 4).step == 4
    assert "already reached its end at step 4: --steps or --minutes moves it" in capsys.readouterr().out


def test_changes_whose_steps_were_lost_are_not_reported():
    starts = [(0, None), (10, {"g_lr": [1, 2]}), (5, {"g_lr": [1, 3]}), (20, None)]
    records = [{"started_at_step": step} | ({"changed": what} if what else {}) for step, what in starts]
    assert changes_of([*records, {"step": 30, "d_loss": 0.0}]) == [(5, {"g_lr": [1, 3]})]


@pytest.mark.parametrize(("batch_size", "kimg"), [(64, 10.0), (32, 0.5)])
def test_the_half_life_of_the_average_is_in_thousands_of_images(batch_size, kimg):
    optim = OptimConfig(batch_size=batch_size, ema_kimg=kimg)
    assert optim.average_decay ** (1000 * kimg / batch_size) == pytest.approx(0.5)
    assert OptimConfig(ema_decay=0.75).average_decay == 0.75
