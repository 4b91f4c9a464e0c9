from __future__ import annotations

import dataclasses
import sys
import types

import pytest

from fastgan import cli
from fastgan.trainer.loop import Trainer


@pytest.fixture(autouse=True)
def no_plot(monkeypatch):
    monkeypatch.setattr("fastgan.trainer.report.pictures.save_losses", lambda metrics, path: None)
    # Remove modules that another test has imported.
    monkeypatch.delitem(sys.modules, "fastgan.trainer.report.tensorboard", raising=False)


class Recorder:
    """Records the calls of a SummaryWriter."""

    said: list[tuple[object, ...]]

    def __init__(self, folder: str, purge_step: int) -> None:
        type(self).said = [("open", folder, purge_step)]

    def __getattr__(self, name: str):
        return lambda *arguments, **options: self.said.append((name, *arguments))


@pytest.fixture
def said(monkeypatch):
    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Recorder
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    return lambda *key: [entry for entry in Recorder.said if entry[: len(key)] == key]


def test_a_board_is_told_every_number_of_the_metrics_the_samples_and_the_alarms(ring8_config, said):
    optim = dataclasses.replace(ring8_config.optim, d_lr=1.0, g_lr=1.0)
    trainer = Trainer(dataclasses.replace(ring8_config, optim=optim, steps=6, log_every=1, tensorboard=True))
    trainer.train()
    assert said("open") == [("open", str(trainer.run.tensorboard), 1)]
    records = [record for record in trainer.run.read_metrics() if "d_loss" in record]
    assert [entry[2:] for entry in said("add_scalar", "d_loss")] == [(r["d_loss"], r["step"]) for r in records]
    layers = records[0]["sigma"]
    assert len(layers) == 4
    assert all(len(said("add_scalar", f"sigma/{layer}")) == 6 for layer in layers)
    assert not said("add_scalar", "step")
    assert "Try: lower --d-lr" in said("add_text", "alarms")[0][2]
    (picture,) = said("add_image", "samples")
    assert picture[2].shape[2] == 3
    assert picture[3] == 6
    assert Recorder.said[-1] == ("close",)


def test_a_resumed_run_takes_back_what_the_board_has_of_later_steps(ring8_config, said):
    config = dataclasses.replace(ring8_config, log_every=1, tensorboard=True)
    Trainer(dataclasses.replace(config, steps=3)).train()
    Trainer(dataclasses.replace(config, resume=True)).train()
    assert said("open")[0][2] == 4
    assert [entry[3] for entry in said("add_scalar", "g_loss")] == [4, 5]


def test_without_the_package_the_run_does_not_start_and_the_error_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    assert cli.main(["train", "ring8", "--steps", "2", "--device", "cpu", "--tensorboard"]) == 2
    assert "pip install 'fastgan[tensorboard]'" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_tensorboard_reads_what_was_written(ring8_config):
    pytest.importorskip("tensorboard", reason="needs fastgan[tensorboard]")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = Trainer(dataclasses.replace(ring8_config, log_every=1, tensorboard=True))
    trainer.train()
    events = EventAccumulator(str(trainer.run.tensorboard)).Reload()
    records = [record for record in trainer.run.read_metrics() if "d_loss" in record]
    losses = [(event.step, event.value) for event in events.Scalars("d_loss")]
    assert losses == [(record["step"], pytest.approx(record["d_loss"], rel=1e-6)) for record in records]
    assert events.Images("samples")[0].step == 5
