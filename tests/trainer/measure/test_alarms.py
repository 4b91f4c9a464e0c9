from __future__ import annotations

import dataclasses
import re

import pytest
import torch

from fastgan.trainer.config import PRESETS, ModelConfig, OptimConfig, TrainConfig
from fastgan.trainer.data.drawn import Source
from fastgan.trainer.data.held_out import hold_out
from fastgan.trainer.data.sources import Images, load_source
from fastgan.trainer.gan import GAN
from fastgan.trainer.loop import Trainer
from fastgan.trainer.measure.alarms import ALARMS, Watch, describe
from fastgan.trainer.measure.diagnostics import Diagnostics
from fastgan.trainer.models.mlp import mlp

CPU = torch.device("cpu")
RING8 = PRESETS["ring8"][1]


def alarms_of(
    steps: int,
    every: int,
    source: Source | None = None,
    held_out: Source | None = None,
    model: dict[str, object] | None = None,
    **optim: object,
) -> set[str]:
    """Return the alarms of a toy run of `steps` steps, with diagnostics in each `every`-th step."""
    source = source or load_source("ring8", 2, CPU)
    optim_config = dataclasses.replace(RING8.optim, **optim)
    held_out = held_out or hold_out(source, optim_config.batch_size, 7)
    model_config = dataclasses.replace(RING8.model, **{"width": 32, "pack": 1, **(model or {})})
    gan = GAN(model_config, optim_config, source, 0, CPU)
    diagnostics, watch = Diagnostics(gan, held_out, 8), Watch()
    for step in range(1, steps + 1):
        if step % every == 0:
            diagnostics.before_step()
        d_loss, g_loss = gan.step().tolist()
        if step % every == 0:
            watch.look({"step": step, "d_loss": d_loss, "g_loss": g_loss} | diagnostics.observe(step))
    return watch.raised


def test_a_saturating_loss_starves_the_generator_and_the_non_saturating_one_feeds_it():
    strong = dict(model={"spectral_norm": "none"}, batch_size=32, d_steps=10, d_lr=1e-2, g_lr=1e-4)
    assert "vanishing gradient" in alarms_of(30, 3, loss="saturating", **strong)
    assert "vanishing gradient" not in alarms_of(30, 3, **strong)
    assert "--loss non-saturating" in remedy("vanishing gradient")


def test_a_huge_learning_rate_diverges_and_a_lower_one_does_not():
    assert "divergence" in alarms_of(20, 2, batch_size=32, d_lr=1.0, g_lr=1.0)
    assert "divergence" not in alarms_of(20, 2, batch_size=32)
    assert "lower --d-lr and --g-lr" in remedy("divergence")


def test_a_generator_that_outruns_the_discriminator_collapses_and_a_slower_one_does_not():
    assert "mode collapse" in alarms_of(400, 20, batch_size=64, g_lr=1e-2)
    assert "mode collapse" not in alarms_of(400, 20, batch_size=64)
    assert "lower --g-lr" in remedy("mode collapse")


def teacher(count: int) -> Images:
    """Vectors made by a network like the generator. The generator can learn them, so D can only memorize."""
    torch.manual_seed(0)
    network = mlp(32, 64, 32)
    with torch.no_grad():
        vectors = 4 * network(torch.randn(count, 32))  # (N, 32)
    return Images(vectors.clamp(-1, 1).add(1).mul(127.5).round().byte(), 3, CPU)


@pytest.mark.long
def test_a_strong_discriminator_learns_few_images_by_heart_and_not_many():
    strong = dict(
        model={"spectral_norm": "none", "width": 64, "latent_dim": 32},
        batch_size=32,
        d_steps=4,
        d_lr=2e-3,
        g_lr=5e-4,
    )
    assert "overfitting" in alarms_of(240, 15, source=teacher(72), **strong)
    assert "overfitting" not in alarms_of(240, 15, source=teacher(5000), **strong)
    assert "more images" in remedy("overfitting")


def drawn_discs(count: int, seed: int) -> Images:
    """Small pictures of a red, a green and a blue disc each."""
    discs = load_source("discs", seed, CPU).next(3 * count).view(count, 3, 32, 32)
    small = torch.nn.functional.avg_pool2d(discs, 4)  # (N, 3, 8, 8)
    return Images(small.add(1).mul(127.5).round().byte(), 3, CPU)


@pytest.mark.long
def test_a_discriminator_of_few_pictures_overfits_and_with_adaptive_augmentation_it_does_not():
    few = dict(
        source=drawn_discs(48, 9),
        held_out=drawn_discs(256, 10),
        model={"architecture": "dcgan", "spectral_norm": "none", "width": 16},
        batch_size=16,
        d_steps=4,
        betas=(0.0, 0.99),
        ada_images=5000,
    )
    assert "overfitting" in alarms_of(300, 20, **few)
    assert "overfitting" not in alarms_of(300, 20, augment="ada", **few)
    assert "--augment ada" in remedy("overfitting")


def remedy(name: str) -> str:
    return next(alarm.remedy for alarm in ALARMS if alarm.name == name)


HEALTHY = {
    "step": 1000,
    "d_loss": 1.3,
    "g_loss": 0.8,
    "g_grad_norm": 1.0,
    "d_real_accuracy": 0.8,
    "d_fake_accuracy": 0.8,
    "overfit": 0.1,
    "d_train": 0.3,
    "d_held_out": 0.2,
    "d_fake": -0.3,
    "diversity": 0.9,
    "nonfinite": 0,
}
ILL = {
    "divergence": {"nonfinite": 3},
    "vanishing gradient": {"d_real_accuracy": 1.0, "d_fake_accuracy": 1.0, "g_grad_norm": 1e-6},
    "mode collapse": {"diversity": 0.1},
    "overfitting": {"overfit": 0.9},
}


@pytest.mark.parametrize("alarm", ALARMS, ids=lambda alarm: alarm.name)
def test_an_alarm_needs_most_of_its_records_ill_rings_once_and_survives_a_resumption(alarm):
    ill = HEALTHY | ILL[alarm.name]
    most = alarm.patience // 2 + 1
    records = [HEALTHY] * alarm.patience + [ill | {"step": 1001 + i} for i in range(3 * alarm.patience)]
    watch = Watch()
    rung = [found for record in records for found in watch.look(record)]
    assert [(found["alarm"], found["step"]) for found in rung] == [(alarm.name, 1000 + most)]
    assert f"Try: {alarm.remedy}" in describe(rung[0])
    resumed = Watch()
    resumed.replay([{"started_at_step": 0}, *records[: alarm.patience + most]])
    assert [found for record in records for found in resumed.look(record)] == []


@pytest.mark.parametrize(("gap", "accuracy", "rings"), [(0.35, 0.8, True), (0.25, 0.8, False), (0.35, 0.5, False)])
def test_a_third_of_the_way_to_the_fakes_is_overfitting_and_a_quarter_is_not(gap, accuracy, rings):
    watch = Watch()
    rung = [watch.look(HEALTHY | {"overfit": gap, "d_real_accuracy": accuracy, "step": step}) for step in range(5)]
    assert [bool(found) for found in rung] == [False] * 4 + [rings]


def test_every_flag_that_a_remedy_names_exists():
    fields = {field.name for group in (TrainConfig, ModelConfig, OptimConfig) for field in dataclasses.fields(group)}
    flags = {flag for alarm in ALARMS for flag in re.findall(r"--([a-z-]+)", alarm.remedy)}
    assert len(flags) >= 6
    assert {flag.replace("-", "_") for flag in flags} <= fields


def test_no_alarm_rings_before_it_has_records_enough():
    ill = HEALTHY | {key: value for values in ILL.values() for key, value in values.items()}
    watch = Watch()
    assert watch.look(ill) + watch.look(ill) == []
    assert [found["alarm"] for found in watch.look(ill)] == ["divergence", "vanishing gradient"]


def test_a_run_prints_its_alarm_once_and_keeps_it(ring8_config, capsys, monkeypatch):
    monkeypatch.setattr("fastgan.trainer.report.pictures.save_losses", lambda metrics, path: None)
    optim = dataclasses.replace(ring8_config.optim, d_lr=1.0, g_lr=1.0, batch_size=32)
    trainer = Trainer(dataclasses.replace(ring8_config, optim=optim, steps=12, log_every=1))
    trainer.train()
    assert capsys.readouterr().out.count("divergence:") == 1
    kept = [record for record in trainer.run.read_metrics() if record.get("alarm") == "divergence"]
    assert len(kept) == 1
    assert "--d-lr" in kept[0]["try"]
