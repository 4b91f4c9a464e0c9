from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import signal
from typing import Any

import pytest
import torch
from PIL import Image

from fastgan.trainer.config import TrainConfig
from fastgan.trainer.errors import CheckpointError, NonFiniteLossError, RunFolderError
from fastgan.trainer.gan import GAN
from fastgan.trainer.loop import Trainer


def train(config: TrainConfig, **changes: Any) -> Trainer:
    trainer = Trainer(dataclasses.replace(config, **changes))
    trainer.train()
    return trainer


def tensors(state: Any) -> list[torch.Tensor]:
    """Every tensor in a nested state, in order; numbers as tensors too."""
    if isinstance(state, dict):
        return [tensor for key in state for tensor in tensors(state[key])]
    if isinstance(state, list | tuple):
        return [tensor for item in state for tensor in tensors(item)]
    return [torch.as_tensor(state)] if isinstance(state, torch.Tensor | int | float) else []


def metrics(trainer: Trainer) -> list[dict[str, Any]]:
    return [json.loads(line) for line in trainer.run.metrics.read_text().splitlines()]


@pytest.fixture
def no_plot(monkeypatch):
    """Matplotlib takes longer than such a run."""
    monkeypatch.setattr("fastgan.trainer.report.pictures.save_losses", lambda metrics, path: None)


@pytest.mark.parametrize(
    ("spectral_norm", "k"),
    [("fused", 1), ("fused", 2), ("fused", 5), ("per-layer", 3), ("torch", 3), ("none", 3)],
)
def test_a_resumed_run_reaches_the_same_bits_as_an_uninterrupted_one(config, spectral_norm, k, no_plot):
    model = dataclasses.replace(config.model, spectral_norm=spectral_norm)
    config = dataclasses.replace(config, model=model)
    whole = train(config, name="whole")
    train(config, name="parts", steps=k)
    torch.manual_seed(12345)  # the state of a new process
    parts = train(config, name="parts", resume=True)
    assert parts.step == whole.step == 6
    wanted, got = tensors(whole.gan.state_dict()), tensors(parts.gan.state_dict())
    assert len(wanted) == len(got) > 100
    assert all(map(torch.equal, got, wanted))
    assert torch.equal(torch.rand(3), _next_random(whole))


def _next_random(trainer: Trainer) -> torch.Tensor:
    state = torch.load(trainer.run.checkpoints / "step-00000006.pt", weights_only=True)
    torch.set_rng_state(state["rng"]["cpu"])
    return torch.rand(3)


def test_two_runs_of_one_seed_are_equal_and_of_two_seeds_are_not(config, no_plot):
    first, second = train(config, name="a"), train(config, name="b")
    other = train(config, name="c", seed=1)
    wanted = tensors(first.gan.state_dict())
    assert all(map(torch.equal, tensors(second.gan.state_dict()), wanted))
    assert not all(map(torch.equal, tensors(other.gan.state_dict()), wanted))


def test_a_run_leaves_everything_that_it_promises(config):
    trainer = train(config)
    header, *records = metrics(trainer)
    assert header["config"] == json.loads(trainer.run.config.read_text()) == config.to_json()
    assert [record["step"] for record in records] == [2, 4, 6]
    assert all(math.isfinite(record["d_loss"] + record["g_loss"]) for record in records)
    report = trainer.run.report.read_text()
    for expected in ("96 real samples in batches of 16", "spectral norm: fused", "samples.png", "losses.png"):
        assert expected in report
    with Image.open(trainer.run.samples) as grid:
        assert grid.size == (
            8 * 34 * 2,
            8 * 34 * 2,
        )  # 64 images of 32 pixels and their margins, twice as large
        assert len(grid.getcolors()) > 50
    with Image.open(trainer.run.losses) as plot:
        assert plot.width > 500
    assert [path.name for path in trainer.run.checkpoints.iterdir()] == ["step-00000006.pt"]
    assert [path.name for path in trainer.run.history.iterdir()] == ["step-00000006.png"]


def test_recorded_losses_are_the_means_of_the_steps_since_the_last_record(config, monkeypatch, no_plot):
    taken = []
    step = GAN.step

    def noted(gan: GAN) -> torch.Tensor:
        taken.append(step(gan))
        return taken[-1]

    monkeypatch.setattr(GAN, "step", noted)
    records = metrics(train(config, steps=4))[1:]
    for record, pair in zip(records, (taken[:2], taken[2:]), strict=True):
        mean = torch.stack(pair).mean(0).tolist()
        assert [record["d_loss"], record["g_loss"]] == pytest.approx(mean)


def test_a_toy_run_reports_its_modes(ring8_config):
    trainer = train(ring8_config)
    assert "of 8 have a sample within 3 sigma" in trainer.run.report.read_text()
    with Image.open(trainer.run.samples) as plot:
        assert plot.width > 300


def test_the_report_carries_the_result_of_a_verification_in_the_folder(config):
    config.folder.mkdir(parents=True)
    result = {"passed": True, "steps": 32, "speed": {"fused_over_torch": 1.25}}
    (config.folder / "verify.json").write_text(json.dumps(result))
    report = train(config).run.report.read_text()
    assert "fused agrees with pure PyTorch over 32 steps; 1.25x as fast" in report


def test_several_discriminator_steps_draw_as_many_real_batches(config, no_plot):
    optim = dataclasses.replace(config.optim, d_steps=2, batch_size=8)
    trainer = train(config, steps=2, optim=optim)
    assert trainer.gan.source.state_dict()["cursor"] == 32
    steps = {name: getattr(trainer.gan, name).state_dict()["state"][0]["step"] for name in ("d_adam", "g_adam")}
    assert steps == {"d_adam": 4, "g_adam": 2}


def test_the_time_limit_counts_earlier_parts_of_the_run(config, no_plot):
    first = train(config, steps=10_000, minutes=0.002)
    assert 0 < first.step < 10_000
    assert first.seconds >= 0.12
    resumed = train(config, steps=10_000, minutes=0.002, resume=True)
    assert resumed.step == first.step


@pytest.mark.usefixtures("no_plot")
class TestRunFolder:
    def test_an_existing_run_is_refused_and_left_alone(self, config):
        trainer = train(config)
        before = trainer.run.metrics.read_text()
        with pytest.raises(RunFolderError, match=r"--resume .* --overwrite"):
            Trainer(config)
        assert trainer.run.metrics.read_text() == before

    def test_overwrite_replaces_the_run_and_keeps_what_is_not_its_own(self, config):
        trainer = train(config)
        (config.folder / "notes.txt").write_text("mine")
        again = train(config, overwrite=True, steps=2)
        assert [record["step"] for record in metrics(again)[1:]] == [2]
        assert [path.name for path in trainer.run.checkpoints.iterdir()] == ["step-00000002.pt"]
        assert (config.folder / "notes.txt").read_text() == "mine"

    def test_resume_with_other_settings_names_them(self, config):
        train(config)
        changed = dataclasses.replace(config, seed=7, optim=dataclasses.replace(config.optim, batch_size=4, d_lr=0.1))
        with pytest.raises(
            RunFolderError, match=r"\(seed: 0 -> 7, batch_size: 16 -> 4\): .* only d_lr, g_lr"
        ) as caught:
            Trainer(dataclasses.replace(changed, resume=True))
        assert "d_lr: " not in str(caught.value)  # this one may change

    def test_resume_without_a_run_is_an_error(self, config):
        with pytest.raises(RunFolderError, match="does not contain a run"):
            Trainer(dataclasses.replace(config, resume=True))

    def test_resume_without_the_checkpoints_that_there_were_is_an_error_and_keeps_the_metrics(self, config):
        trainer = train(config)
        before = trainer.run.metrics.read_text()
        shutil.rmtree(trainer.run.checkpoints)
        with pytest.raises(CheckpointError, match="metrics up to step 6, but its checkpoints are gone: put them back"):
            Trainer(dataclasses.replace(config, resume=True))
        assert trainer.run.metrics.read_text() == before

    def test_a_run_that_was_killed_before_its_first_checkpoint_starts_again(self, config):
        trainer = train(config)
        shutil.rmtree(trainer.run.checkpoints)
        trainer.run.report.unlink()
        assert train(config, resume=True).step == 6

    def test_a_run_that_cannot_start_leaves_no_folder(self, config, tmp_path):
        with pytest.raises(RuntimeError):
            Trainer(dataclasses.replace(config, data=tmp_path / "missing"))
        assert not config.folder.exists()

    def test_metrics_after_the_checkpoint_are_dropped_even_when_cut_short(self, config):
        trainer = train(config, steps=4)
        with open(trainer.run.metrics, "a") as file:
            file.write('{"step": 6, "d_loss": 0, "g_loss": 0}\n{"step": 8, "d_lo')
        resumed = train(config, resume=True)
        assert [record["step"] for record in metrics(resumed) if "step" in record] == [2, 4, 6]


@pytest.mark.parametrize(("player", "index"), [("discriminator", 0), ("generator", 1)])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_run_and_names_itself(config, monkeypatch, player, index, value):
    step = GAN.step

    def broken(gan: GAN) -> torch.Tensor:
        losses = step(gan)
        if gan.ema.updates == 5:  # between two records
            losses[index] = value
        return losses

    monkeypatch.setattr(GAN, "step", broken)
    trainer = Trainer(dataclasses.replace(config, checkpoint_every=2))
    with pytest.raises(NonFiniteLossError, match=f"step 5: the {player}'s loss is {value}"):
        trainer.train()
    assert sorted(path.name for path in trainer.run.checkpoints.iterdir()) == [
        "step-00000002.pt",
        "step-00000004.pt",
    ]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_a_checkpoint_that_resumes_to_the_same_bits(config, monkeypatch, number, no_plot):
    whole = train(config, name="whole")
    step = GAN.step

    def interrupted(gan: GAN) -> torch.Tensor:
        if gan.ema.updates == 2:
            os.kill(os.getpid(), number)
        return step(gan)

    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(GAN, "step", interrupted)
        trainer = Trainer(config)
        assert trainer.train() == number
    assert trainer.step == 3
    assert signal.getsignal(number) is before
    assert (trainer.run.checkpoints / "step-00000003.pt").exists()
    resumed = train(config, resume=True)
    assert all(map(torch.equal, tensors(resumed.gan.state_dict()), tensors(whole.gan.state_dict())))


def test_a_second_signal_is_not_held_back(config, monkeypatch):
    def twice(gan: GAN) -> torch.Tensor:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("the second signal should have ended this step")

    monkeypatch.setattr(GAN, "step", twice)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            Trainer(config).train()
    finally:
        signal.signal(signal.SIGINT, before)
