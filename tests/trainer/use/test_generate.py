from __future__ import annotations

import dataclasses
import errno
import os

import numpy as np
import pytest
import torch
from PIL import Image

from fastgan import cli
from fastgan.trainer.config import PRESETS
from fastgan.trainer.loop import Trainer
from fastgan.trainer.use.generate import GenerateConfig, generate, interpolation, spherical
from fastgan.trainer.use.trained import load_trained

CPU = torch.device("cpu")


def test_samples_are_those_of_the_runs_average_to_the_bit_also_from_its_export(run, config):
    pytest.importorskip("safetensors", reason="needs fastgan[export]")
    z = torch.randn(5, 8)
    wanted = run.gan.samples(z)
    assert torch.equal(load_trained(config.folder, CPU).samples(z), wanted)
    assert cli.main(["export", str(config.folder)]) == 0
    exported = load_trained(config.folder / "generator.safetensors", CPU)
    assert torch.equal(exported.samples(z), wanted)
    assert exported.class_names == ["cat", "dog"]
    flags = ["--samples", "3", "--format", "safetensors", "--device", "cpu", "--out", str(config.runs / "out")]
    assert cli.main(["generate", str(config.folder), *flags]) == 0
    from safetensors.torch import load_file

    saved = load_file(config.runs / "out" / "samples.safetensors")
    assert torch.equal(saved["samples"], run.gan.samples(saved["latents"], saved["labels"]))
    assert saved["labels"].tolist() == [0, 1, 0]


def test_pictures_a_grid_and_an_array_are_written(run, config, capsys):
    flags = ["--samples", "3", "--grid", "2x3", "--format", "npz", "--seed", "4", "--device", "cpu"]
    assert cli.main(["generate", str(config.folder), *flags]) == 0
    out = config.folder / "generated"
    assert sorted(path.name for path in out.iterdir()) == [
        *("grid.png", "sample-0000.png", "sample-0001.png", "sample-0002.png", "samples.npz")
    ]
    assert str(out / "samples.npz") in capsys.readouterr().out
    assert Image.open(out / "grid.png").size == (2 * 3 * 34, 2 * 2 * 18)
    saved = np.load(out / "samples.npz")
    assert saved["samples"].shape == (3, 16, 32, 3)
    assert saved["labels"].tolist() == [0, 1, 0]
    for number in range(3):
        assert (np.asarray(Image.open(out / f"sample-{number:04}.png")) == saved["samples"][number]).all()
    trained = load_trained(config.folder, CPU)
    pixels = trained.samples(trained.latents(3, 4)).clamp(-1, 1).add(1).mul(127.5).round().byte()
    assert (pixels.permute(0, 2, 3, 1).numpy() == saved["samples"]).all()


def test_samples_of_an_earlier_call_are_removed_and_nothing_else(run, config):
    out = config.folder / "generated"
    command = ["generate", str(config.folder), "--device", "cpu", "--samples"]
    assert cli.main([*command, "4"]) == 0
    (out / "sample-0003-large.png").touch()
    (out / "sample-mine.png").touch()
    others = ["sample-0003-large.png", "sample-mine.png"]
    assert cli.main([*command, "2"]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["sample-0000.png", "sample-0001.png", *others]
    assert cli.main([*command, "0", "--grid", "1x1"]) == 0
    assert {"grid.png", "sample-0000.png"} < {path.name for path in out.iterdir()}


def test_the_first_latents_are_the_same_for_every_number_of_samples(run, config):
    trained = load_trained(config.folder, CPU)
    for count in (1, 2, 3, 5):
        assert torch.equal(trained.latents(count, 3), trained.latents(7, 3)[:count])
    assert not torch.equal(trained.latents(7, 3), trained.latents(7, 4))


def test_a_class_is_chosen_by_its_name_or_number(run, config, tmp_path):
    def samples(name: str) -> np.ndarray:
        flags = ["--class", name, "--samples", "2", "--format", "npz", "--device", "cpu", "--out", str(tmp_path / name)]
        assert cli.main(["generate", str(config.folder), *flags]) == 0
        saved = np.load(tmp_path / name / "samples.npz")
        assert len(set(saved["labels"].tolist())) == 1
        return saved["samples"]

    assert (samples("dog") == samples("1")).all()
    assert (samples("dog") != samples("cat")).any()


def test_an_unknown_class_is_one_line_that_names_the_known(run, config, capsys):
    assert cli.main(["generate", str(config.folder), "--class", "bird"]) == 2
    assert capsys.readouterr().err == "fastgan: no class 'bird': choose from cat, dog\n"
    assert not (config.folder / "generated").exists()


def test_truncation_scales_the_latents(run, config, tmp_path):
    for truncation in ("1", "0"):
        flags = ["--samples", "2", "--format", "npz", "--class", "cat", "--truncation", truncation, "--device", "cpu"]
        assert cli.main(["generate", str(config.folder), *flags, "--out", str(tmp_path / truncation)]) == 0
    none, all_ = (np.load(tmp_path / name / "samples.npz") for name in ("0", "1"))
    assert (none["samples"][0] == none["samples"][1]).all()
    assert (none["latents"] == 0).all()
    assert (all_["samples"][0] != all_["samples"][1]).any()


@pytest.mark.parametrize("animation", ["webp", "gif"])
def test_an_interpolation_is_a_looped_animation(run, config, animation):
    flags = ["--interpolate", "6", "--animation", animation, "--samples", "0", "--grid", "2x2", "--device", "cpu"]
    assert cli.main(["generate", str(config.folder), *flags]) == 0
    with Image.open(config.folder / "generated" / f"interpolation.{animation}") as image:
        assert image.n_frames == 6
        assert image.size == (2 * 2 * 34, 2 * 2 * 18)
        assert image.info.get("loop") == 0


def test_an_interpolation_returns_to_its_start_without_a_jump(run, config):
    trained = load_trained(config.folder, CPU)
    seen: list[torch.Tensor] = []
    trained.samples = lambda z, labels=None: seen.append(z) or torch.zeros(len(z), 3, 16, 32)  # type: ignore[method-assign]
    frames = list(interpolation(trained, GenerateConfig(config.folder), 40, (1, 1)))
    assert len(frames) == 40
    z = torch.cat(seen)
    steps = (z - z.roll(1, 0)).norm(dim=1)
    assert steps.max() < 0.5 * z.norm(dim=1).mean()
    assert torch.equal(z[0], trained.latents(4, 0)[0])


def test_the_path_between_two_latents_keeps_their_length():
    start, end = torch.randn(2, 7, 64)
    for t in (0.0, 0.3, 1.0):
        between = spherical(start, end, t)
        wanted = torch.lerp(start.norm(dim=1), end.norm(dim=1), t)
        assert torch.allclose(between.norm(dim=1), wanted, rtol=1e-4)
    assert torch.allclose(spherical(start, end, 0.0), start, atol=1e-5)
    assert torch.allclose(spherical(start, end, 1.0), end, atol=1e-5)
    assert torch.allclose(spherical(start, start, 0.4), start, atol=1e-5)


def test_points_are_written_as_an_array_only(ring8_config, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(Trainer, "_summarize", lambda trainer: None)
    Trainer(ring8_config).train()
    assert cli.main(["generate", str(ring8_config.folder)]) == 2
    assert "--format npz writes an array" in capsys.readouterr().err
    written = generate(GenerateConfig(ring8_config.folder, samples=7, format="npz", device="cpu", out=tmp_path / "out"))
    assert np.load(written[-1])["samples"].shape == (7, 2)


@pytest.mark.parametrize(
    "flags",
    [
        *(["--grid", "4"], ["--interpolate", "1"], ["--samples", "-1"], ["--samples", "0"], ["--format", "jpg"]),
        *(["--truncation", "inf"], ["--truncation", "-1"], ["--seed", "-1"], ["--seed", "99999999999999999999"]),
    ],
)
def test_wrong_flags_are_refused(flags, capsys):
    assert cli.main(["generate", "runs/photos", *flags]) == 2
    error = capsys.readouterr().err
    assert flags[0].removeprefix("--") in error
    assert error.count("\n") == 1


def test_a_folder_without_a_run_is_one_line(tmp_path, capsys):
    assert cli.main(["generate", str(tmp_path)]) == 2
    assert "does not contain a run" in capsys.readouterr().err


def test_classes_without_names_have_numbers(ring8_config, monkeypatch):
    monkeypatch.setattr(Trainer, "_summarize", lambda trainer: None)
    model = dataclasses.replace(PRESETS["ring8"][1].model, width=8, pack=1, conditional=True)
    Trainer(dataclasses.replace(ring8_config, model=model)).train()
    assert load_trained(ring8_config.folder, CPU).class_number("7") == 7


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        (["--samples", "2"], "sample-0000.png"),
        (["--samples", "0", "--grid", "1x2"], "grid.png"),
        (["--samples", "0", "--interpolate", "2"], "interpolation.webp"),
    ],
)
def test_a_picture_that_a_full_disk_cuts_short_is_removed_and_named(run, config, monkeypatch, capsys, flags, name):
    def save(image, path, **options):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Image.Image, "save", save)
    out = config.runs.parent / "out"
    assert cli.main(["generate", str(config.folder), *flags, "--out", str(out), "--device", "cpu"]) == 2
    assert f"{out / name}: No space left on device" in capsys.readouterr().err
    assert not list(out.iterdir())


def test_each_checkpoint_that_is_kept_makes_its_own_samples_and_is_a_start(config, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(Trainer, "_summarize", lambda trainer: None)
    monkeypatch.setattr(Trainer, "_draw", lambda trainer: None)
    averages = {}
    save = Trainer._save

    def saved(trainer, bar):
        averages[trainer.step] = {key: value.clone() for key, value in trainer.gan.ema.module.state_dict().items()}
        save(trainer, bar)

    monkeypatch.setattr(Trainer, "_save", saved)
    Trainer(dataclasses.replace(config, steps=5, checkpoint_every=4, keep_every=1)).train()
    assert sorted(averages) == [1, 2, 3, 4, 5]
    path = config.folder / "checkpoints" / "step-00000002.pt"
    trained = load_trained(path, torch.device("cpu"))
    assert trained.step == 2
    assert all(torch.equal(value, averages[2][key]) for key, value in trained.generator.state_dict().items())
    assert cli.main(["generate", str(path), "--samples", "1", "--device", "cpu"]) == 0
    assert (config.folder / "generated" / "sample-0000.png").exists()
    started = Trainer(dataclasses.replace(config, name="on", init_from=path))
    assert all(torch.equal(value, averages[2][key]) for key, value in started.gan.generator.state_dict().items())
    assert "all tensors fit" in capsys.readouterr().out
    assert cli.main(["generate", str(path.with_name("step-00000009.pt"))]) == 2
    assert capsys.readouterr().err.endswith("step-00000009.pt cannot be read: No such file or directory\n")
