from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from fastgan import cli
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
