from __future__ import annotations

import dataclasses

import pytest
import torch

from fastgan.trainer.config import TrainConfig
from fastgan.trainer.data.options import PictureConfig
from fastgan.trainer.export import read_export
from fastgan.trainer.gan import GAN
from fastgan.trainer.loop import Trainer
from fastgan.trainer.measure.quality import cost
from fastgan.trainer.report.page import summary
from fastgan.trainer.use.trained import load_trained
from tests.trainer.use.conftest import write_pictures

pytest.importorskip("safetensors", reason="needs fastgan[export]")


@pytest.fixture
def scored(config, tmp_path) -> TrainConfig:
    return dataclasses.replace(
        config,
        dataset="folder",
        data=write_pictures(tmp_path / "pictures", 120),
        image_size="16x32",
        pictures=PictureConfig(channels=3),
        steps=6,
        score_every=2,
        checkpoint_every=3,
    )


def trained(config: TrainConfig, **changes: object) -> Trainer:
    trainer = Trainer(dataclasses.replace(config, **changes))
    trainer.train()
    return trainer


def test_scores_are_recorded_and_the_best_generator_is_kept(scored, monkeypatch, capsys):
    kept = {}
    original = Trainer._score

    def score_and_keep(trainer: Trainer) -> None:
        kept[trainer.step] = {name: t.clone() for name, t in trainer.gan.ema.module.state_dict().items()}
        original(trainer)

    monkeypatch.setattr(Trainer, "_score", score_and_keep)
    trainer = trained(scored)
    records = [record for record in trainer.run.read_metrics() if "cost" in record]
    assert [record["step"] for record in records] == [2, 4, 6]
    assert all(record["cost"] == cost(record["scores"]) for record in records)
    best = min(records, key=lambda record: record["cost"])
    _, data, step, weights = read_export(trainer.run.best)
    assert step == best["step"]
    assert data["shape"] == [3, 16, 32]
    assert all(torch.equal(weights[name], tensor) for name, tensor in kept[step].items())
    assert load_trained(scored.folder, torch.device("cpu"), best=True).step == step
    last = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("scores of 12 samples: KID-"))
    assert last.endswith("; 1,000 samples were asked for and 12 are held out, so the scores compare 12")
    report = trainer.run.report.read_text()
    assert f"| best generator | step {step}, cost" in report
    assert "1,000 samples were asked for and 12 are held out, so the scores compare 12" in report
    page = trainer.run.html.read_text()
    assert "KID-RandomConv on held-out pictures" in page
    assert "Quality of the samples" in page


def test_scored_samples_have_the_classes_of_the_held_out_pictures(scored, monkeypatch):
    write_pictures(scored.data, 200)
    for path in sorted((scored.data / "dog").iterdir())[20:]:  # a rare class
        path.unlink()
    model = dataclasses.replace(scored.model, conditional=True)
    optim = dataclasses.replace(scored.optim, batch_size=4)  # fewer than the samples
    trainer = Trainer(dataclasses.replace(scored, model=model, optim=optim))
    seen = []
    samples = GAN.samples
    monkeypatch.setattr(GAN, "samples", lambda gan, z, labels=None: seen.append(labels) or samples(gan, z, labels))
    trainer._score()
    held_out = trainer.held_out
    wanted = held_out.labels[held_out.members].bincount()
    assert len(seen) == 3
    assert torch.equal(torch.cat(seen).bincount(minlength=2), wanted)
    assert wanted[0] > wanted[1]


@pytest.mark.parametrize(
    ("quality", "line"),
    [
        ({"unscored": "too few"}, "no scores: too few"),
        ({}, "no scores"),
        (
            {"n": 2500, "covered": 7, "total": 8, "high_quality": 0.5},
            "scores of 2,500 samples: covered 7, high_quality 0.5",
        ),
        (
            {"n": 9, "KID-X": 0.25, "precision": 1, "recall": 0.5, "floor": {"KID-X": 0.125, "recall": 1.0}},
            "scores of 9 samples: KID-X 0.25 (floor 0.125), recall 0.5 (floor 1)",
        ),
    ],
)
def test_the_scores_are_one_line(quality, line):
    assert summary(quality) == line


def test_scores_do_not_change_the_run(scored, monkeypatch):
    monkeypatch.setattr(Trainer, "_summarize", lambda trainer: None)
    with_scores, without = trained(scored), trained(scored, name="without", score_every=None)
    states = (trainer.gan.generator.state_dict() for trainer in (with_scores, without))
    assert all(map(torch.equal, *(state.values() for state in states)))


def test_a_resumed_run_remembers_the_best_score(scored, monkeypatch):
    monkeypatch.setattr(Trainer, "_summarize", lambda trainer: None)
    costs = iter([0.2, 0.5, 0.4, 0.1])
    monkeypatch.setattr("fastgan.trainer.loop.score", lambda *_: {"KID-x": next(costs)})
    trained(scored, steps=4)
    trainer = trained(scored, steps=6, resume=True)
    assert read_export(trainer.run.best)[2] == 2
    trained(scored, steps=8, resume=True)
    assert read_export(trainer.run.best)[2] == 8
