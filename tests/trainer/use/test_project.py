from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image

from fastgan import cli
from fastgan.trainer.data.options import PictureConfig
from fastgan.trainer.loop import Trainer
from fastgan.trainer.report.pictures import as_picture
from fastgan.trainer.use.trained import load_trained

CPU = torch.device("cpu")


def test_a_sample_is_found_again(run, config, tmp_path, capsys):
    trained = load_trained(config.folder, CPU)
    z = trained.latents(1, 99)
    picture = tmp_path / "sample.png"
    as_picture(trained.samples(z, trained.labels(1, "dog"))[0]).save(picture)
    flags = ["--steps", "150", "--starts", "32", "--device", "cpu", "--class", "dog"]
    assert cli.main(["project", str(config.folder), str(picture), *flags]) == 0
    out = config.folder / "projected" / "sample"
    numbers = json.loads((out / "projection.json").read_text())
    assert numbers["rms_pixel_error"] < 0.35 * numbers["rms_pixel_error_at_start"]
    assert numbers["distance-RandomConv"] < 0.5 * numbers["distance-RandomConv_at_start"]
    assert numbers["class"] == "dog"
    found = torch.from_numpy(np.load(out / "latent.npz")["latent"])
    sample = trained.samples(found, trained.labels(1, "dog"))
    error = (sample - trained.samples(z, trained.labels(1, "dog"))).square().mean().sqrt() / 2
    assert abs(float(error) - numbers["rms_pixel_error"]) < 0.01
    assert Image.open(out / "projection.png").size == (2 * 3 * 34, 2 * 18)
    assert "rms_pixel_error" in capsys.readouterr().out


def test_the_result_is_never_farther_than_the_start(run, config, tmp_path):
    Image.new("RGB", (32, 16), (250, 20, 20)).save(tmp_path / "red.png")
    flags = ["--steps", "0", "--starts", "8", "--device", "cpu"]
    assert cli.main(["project", str(config.folder), str(tmp_path / "red.png"), *flags]) == 0
    numbers = json.loads((config.folder / "projected" / "red" / "projection.json").read_text())
    assert numbers["rms_pixel_error"] == pytest.approx(numbers["rms_pixel_error_at_start"], rel=1e-5)


def test_pictures_of_one_name_keep_their_results_and_the_same_picture_replaces_its_own(run, config, tmp_path, capsys):
    home = config.folder / "projected"
    for name in ("a/red.png", "b/red.png", "b/red.bmp", "b/red.png"):
        picture = tmp_path / name
        picture.parent.mkdir(exist_ok=True)
        Image.new("RGB", (32, 16), (250, 20, 20)).save(picture)
        flags = ["--steps", "0", "--starts", "2", "--device", "cpu"]
        assert cli.main(["project", str(config.folder), str(picture), *flags]) == 0
    results = {folder.name: json.loads((folder / "projection.json").read_text()) for folder in home.iterdir()}
    kept = {name: result["picture"] for name, result in results.items() if result["picture"].startswith(str(tmp_path))}
    assert list(kept.values()).count(str(tmp_path / "b/red.png")) == 1
    assert {str(tmp_path / name) for name in ("a/red.png", "b/red.bmp")} < set(kept.values())


@pytest.mark.filterwarnings("error")
def test_gray_pictures_without_classes_give_no_warning_and_no_class(config, monkeypatch, capsys):
    monkeypatch.setattr(Trainer, "_summarize", lambda trainer: None)
    model = dataclasses.replace(config.model, conditional=False)
    gray = dataclasses.replace(config, model=model, pictures=PictureConfig(channels=1), steps=1)
    Trainer(gray).train()
    picture = next(config.data.rglob("*.png"))
    capsys.readouterr()
    flags = ["--steps", "0", "--starts", "2", "--device", "cpu"]
    assert cli.main(["project", str(gray.folder), str(picture), *flags]) == 0
    assert "class" not in capsys.readouterr().out
    numbers = json.loads((gray.folder / "projected" / picture.stem / "projection.json").read_text())
    assert numbers["class"] is None


@pytest.mark.parametrize(
    ("name", "says"),
    [("flat", "no gradient passes"), ("array", "must return features"), ("flat", "cannot be written to")],
)
def test_what_would_fail_after_the_search_fails_before_it(run, config, tmp_path, capsys, monkeypatch, name, says):
    text = "def flat(images): return images.detach().flatten(1)\n\ndef array(images): return images.numpy()\n"
    (tmp_path / "own_features.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("fastgan.trainer.use.project.nearest", None)  # an attempt to call it fails
    picture = next(config.data.rglob("*.png"))
    out = ["--out", str(picture / "x")] if "written" in says else []
    flags = ["--extractor", f"own_features:{name}", "--device", "cpu", *out]
    assert cli.main(["project", str(config.folder), str(picture), *flags]) == 2
    assert says in capsys.readouterr().err
    assert not (config.folder / "projected").exists()


def test_what_is_no_picture_is_one_line(run, config, tmp_path, capsys):
    (tmp_path / "text.png").write_text("text")
    capsys.readouterr()
    assert cli.main(["project", str(config.folder), str(tmp_path / "text.png")]) == 2
    error = capsys.readouterr().err
    assert "text.png cannot be read" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "flags", [["--steps", "-1"], ["--starts", "0"], ["--lr", "0"], ["--lr", "nan"], ["--seed", "-1"]]
)
def test_wrong_flags_are_refused(flags, capsys):
    assert cli.main(["project", "runs/photos", "picture.png", *flags]) == 2
    assert flags[0].removeprefix("--") in capsys.readouterr().err
