"""Folders, zip files and StyleGAN's data sets: labels, formats, sizes, files that are left out, changed data."""

from __future__ import annotations

import dataclasses
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastgan import cli
from fastgan.trainer.config import PRESETS, TrainConfig
from fastgan.trainer.data.image_folder import read_pictures
from fastgan.trainer.data.labels import chosen_split, find_labels
from fastgan.trainer.data.options import PictureConfig
from fastgan.trainer.data.pixels import Layout, endings, open_image, pixels_of
from fastgan.trainer.data.size import sides
from fastgan.trainer.data.sources import Images, load_source, windows
from fastgan.trainer.errors import DataError
from fastgan.trainer.loop import Trainer

CPU = torch.device("cpu")
SQUARE = Layout(16, 16)


def picture(path: Path, color: object = "red", mode: str = "RGB", size: tuple[int, int] = (20, 20)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path)  # type: ignore[arg-type]
    return path


def pixels_in(path: Path, layout: Layout) -> np.ndarray:
    return pixels_of(open_image(path.read_bytes()), layout)


def zipped(folder: Path, file: Path) -> Path:
    with zipfile.ZipFile(file, "w") as archive:
        for path in sorted(folder.rglob("*")):
            archive.write(path, path.relative_to(folder))
    return file


@pytest.fixture(params=["folder", "zip"])
def packed(request, tmp_path):
    """Return a function that gives a folder unchanged, or as a zip file."""
    return lambda folder: folder if request.param == "folder" else zipped(folder, tmp_path / "data.zip")


def test_class_folders_are_labels_and_what_systems_leave_behind_is_no_class(tmp_path, packed):
    data = tmp_path / "d"
    for name in ("cat/1.png", "cat/00000/2.png", "dog/3.png", ".ipynb_checkpoints/4.png", "__MACOSX/cat/._1.png"):
        picture(data / name)
    found = read_pictures(packed(data), SQUARE)
    assert found.names == ["cat/00000/2.png", "cat/1.png", "dog/3.png"]
    assert found.labels.tolist() == [0, 0, 1]
    assert found.class_names == ["cat", "dog"]
    assert "2 classes from folder names: cat, dog" in found.notes


def test_a_folder_around_everything_is_no_class(tmp_path, packed):
    for name in ("photos/cat/1.png", "photos/dog/3.png"):
        picture(tmp_path / "d" / name)
    assert read_pictures(packed(tmp_path / "d"), SQUARE).class_names == ["cat", "dog"]


@pytest.mark.parametrize("place", ["", "set/"])
def test_stylegans_data_set_has_the_labels_of_its_dataset_json(tmp_path, packed, place, capsys):
    data = tmp_path / "d"
    names = ["00000/img00000000.png", "00000/img00000001.png", "00001/img00000002.png"]
    for name in [*names, "00001/img00000003.png"]:
        picture(data / place / name)
    labels = [[names[0], 7], [names[1], [0, 0, 0, 1]], [names[2], 7]]
    (data / place / "dataset.json").write_text(json.dumps({"labels": labels}))
    found = read_pictures(packed(data), SQUARE)
    assert found.labels.tolist() == [1, 0, 1]
    assert found.class_names == ["3", "7"]
    assert any(f"2 classes from {place}dataset.json" in note for note in found.notes)
    assert "img00000003.png: it has no label" in capsys.readouterr().err


def test_shards_and_a_dataset_json_without_labels_give_none(tmp_path, packed):
    for name in ("00000/a.png", "00001/b.png"):
        picture(tmp_path / "d" / name)
    (tmp_path / "d" / "dataset.json").write_text('{"labels": null}')
    found = read_pictures(packed(tmp_path / "d"), SQUARE)
    assert found.labels is None
    assert found.notes[-1].startswith("no labels")


def test_the_rule_can_be_forced():
    names = ["00000/a.png", "00001/b.png"]
    listed = json.dumps({"labels": [["00000/a.png", 1], ["00001/b.png", 0]]}).encode()
    assert find_labels(names, "auto", listed).of == {"00000/a.png": 1, "00001/b.png": 0}
    assert find_labels(names, "folders", listed).of == {"00000/a.png": 0, "00001/b.png": 1}
    assert find_labels(names, "none", listed).of is None
    with pytest.raises(DataError, match=r"needs a dataset\.json"):
        find_labels(names, "json", None)
    with pytest.raises(DataError, match="every picture in a folder"):
        find_labels(["a.png", "cat/b.png"], "folders", None)
    with pytest.raises(DataError, match="not one-hot"):
        find_labels(names, "auto", b'{"labels": [["00000/a.png", [0.5, 0.5]]]}')
    with pytest.raises(DataError, match="names none of the pictures"):
        find_labels(names, "auto", b'{"labels": [["other.png", 1]]}')


def test_a_split_is_no_class_and_is_chosen_by_its_name(tmp_path):
    names = [f"{split}/{kind}/{i}.png" for split in ("test", "train", "val") for kind in ("cat", "dog") for i in "12"]
    kept, line = chosen_split(names, None)
    assert kept == [name for name in names if name.startswith("train/")]
    assert line == "the split train, not test, val (--split NAME)"
    assert find_labels(kept, "auto", None).names == ["cat", "dog"]
    assert chosen_split(names, "val")[0] == [name for name in names if name.startswith("val/")]
    with pytest.raises(DataError, match="no split 'dev': the data has test, train, val"):
        chosen_split(names, "dev")
    assert chosen_split(["train/1.png", "plane/2.png"], None)[0] == ["train/1.png", "plane/2.png"]  # classes
    for name in names:
        picture(tmp_path / name)
    source = load_source("folder", 0, CPU, tmp_path, 16, PictureConfig(split="test"))
    assert source.size == 4


def test_links_to_folders_are_followed_once(tmp_path):
    picture(tmp_path / "elsewhere" / "1.png")
    picture(tmp_path / "d" / "cat" / "2.png")
    (tmp_path / "d" / "dog").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "d" / "again").symlink_to(tmp_path / "d" / "cat")
    (tmp_path / "d" / "cat" / "loop").symlink_to(tmp_path / "d")
    assert read_pictures(tmp_path / "d", SQUARE).names == ["cat/2.png", "dog/1.png"]


@pytest.mark.parametrize("ending", [".tiff", ".bmp", ".gif", ".ppm", ".jfif", ".webp", ".avif", ".JPG", ".tga", ".jp2"])
def test_the_endings_that_pillow_reads_are_read(tmp_path, ending):
    if ending.lower() not in endings():
        pytest.skip(f"this Pillow does not read {ending}")
    try:
        picture(tmp_path / f"a{ending}", (250, 10, 10))
    except (OSError, ValueError, KeyError) as error:
        pytest.skip(f"this Pillow cannot write {ending}: {error}")
    picture(tmp_path / "b.png")
    found = read_pictures(tmp_path, SQUARE)
    assert found.images[0].float().mean((1, 2)).sub(torch.tensor([250.0, 10, 10])).abs().max() < 12


@pytest.mark.parametrize(
    ("mode", "color", "wanted"),
    [
        ("CMYK", (0, 255, 255, 0), [255, 0, 0]),
        ("L", 70, [70, 70, 70]),
        ("LA", (70, 0), [255, 255, 255]),
        ("I;16", 257 * 90, [90, 90, 90]),
        ("F", 0.2, [51, 51, 51]),
        ("1", 1, [255, 255, 255]),
    ],
)
def test_every_mode_becomes_rgb(tmp_path, mode, color, wanted):
    image = Image.fromarray(np.full((8, 8), 257 * 90, np.uint16)) if mode == "I;16" else Image.new(mode, (8, 8), color)
    image.save(tmp_path / "a.tiff")
    assert pixels_in(tmp_path / "a.tiff", Layout(8, 8))[:, 4, 4].tolist() == wanted


def test_a_palette_with_transparency_takes_the_background(tmp_path):
    image = Image.new("P", (8, 8), 0)
    image.putpalette([0, 0, 255, 255, 0, 0])
    image.save(tmp_path / "a.gif", transparency=0)
    assert pixels_in(tmp_path / "a.gif", Layout(8, 8, background="lime"))[:, 4, 4].tolist() == [0, 255, 0]
    with pytest.raises(ValueError, match=r"background must be a color, such as .*, got 'lemon-ish'"):
        Layout(8, 8, background="lemon-ish")


def test_the_first_frame_of_an_animation_is_read(tmp_path):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert pixels_in(tmp_path / "a.gif", Layout(8, 8))[:, 4, 4].tolist() == [255, 0, 0]


@pytest.mark.parametrize(("channels", "wanted"), [(1, [76]), (3, [255, 0, 0]), (4, [255, 0, 0, 255])])
def test_channels_are_gray_color_or_color_with_alpha(tmp_path, channels, wanted):
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png", (9, 9, 9, 0), "RGBA")
    source = load_source("folder", 0, CPU, tmp_path, 16, PictureConfig(channels=channels))
    assert source.shape == (channels, 16, 16)
    assert source.images[0, :, 8, 8].tolist() == wanted
    assert source.images[1, -1, 8, 8] == (0 if channels == 4 else 255)


def test_gray_pictures_stay_the_same_gray(tmp_path):
    Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).save(tmp_path / "a.png")
    assert (pixels_in(tmp_path / "a.png", Layout(16, 16, channels=1)).ravel() == np.arange(256)).all()


def test_a_crop_keeps_the_proportions_and_none_keeps_the_whole_picture(tmp_path):
    image = Image.new("RGB", (96, 32), "red")
    image.paste("blue", (32, 0, 64, 32))
    assert (pixels_of(image, Layout(16, 16))[0] < 20).all()
    middle = pixels_of(image, Layout(16, 48))[0, 8]
    assert (middle[[0, 8, 14]] > 200).all()
    assert (middle[[18, 24, 30]] < 50).all()
    whole = pixels_of(image, Layout(16, 16, crop="none"))
    assert (whole[0, 8, [2, 8, 13]] > 127).tolist() == [True, False, True]


def test_a_random_crop_and_mirrors_change_every_epoch_and_resume_to_the_same_bits(tmp_path):
    for i in range(6):
        values = np.random.default_rng(i).integers(0, 256, (40, 40, 3), np.uint8)
        Image.fromarray(values).save(tmp_path / f"{i}.png")
    settings = PictureConfig(crop="random", mirror=True)
    source = load_source("folder", 0, CPU, tmp_path, 16, settings)
    assert source.shape == (3, 16, 16)
    assert source.images.shape == (6, 3, 18, 18)
    first = source.next(6)
    state = source.state_dict()
    second = source.next(6)
    matches = (first[:, None] == second[None]).flatten(2).all(2).any(1)
    assert not matches.all()
    other = load_source("folder", 5, CPU, tmp_path, 16, settings)
    other.load_state_dict(state)
    assert torch.equal(other.next(6), second)


def test_a_window_is_the_part_that_its_corner_says():
    pixels = torch.arange(2 * 3 * 5 * 6).view(2, 3, 5, 6)
    found = windows(pixels, torch.tensor([[0.0, 0.99], [0.5, 0.0]]), (4, 4))
    assert torch.equal(found[0], pixels[0, :, 0:4, 1:5])
    assert torch.equal(found[1], pixels[1, :, 1:5, 0:4])


def test_half_of_the_pictures_are_mirrored_and_none_without_the_flag():
    images = torch.zeros(400, 1, 1, 2, dtype=torch.uint8)
    images[..., 0] = 255
    assert (Images(images, 0, CPU).next(400)[..., 0] == 1).all()
    assert 120 < (Images(images, 0, CPU, mirror=True).next(400)[..., 0] == 1).sum() < 280


def test_files_that_are_left_out_are_counted_and_named_from_the_cache_too(tmp_path, capsys, packed):
    data = tmp_path / "d"
    for name in "abc":
        picture(data / f"{name}.png")
    for i in range(7):
        (data / f"bad{i}.png").write_text("no picture")
    (data / "notes.txt").write_text("text")
    (data / "clip.mp4").write_bytes(b"x")
    data = packed(data)
    for _ in range(2):
        found = read_pictures(data, SQUARE)
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 6
        assert "skipped bad0.png: " in lines[0]
        assert lines[-1] == "fastgan: skipped 2 more, 7 in all"
        assert "2 files are not pictures (.mp4 1, .txt 1)" in found.notes
    assert (tmp_path / "cache").exists()


def test_a_damaged_zip_and_a_damaged_member_are_named(tmp_path, capsys):
    (tmp_path / "bad.zip").write_bytes(b"PK not a zip")
    assert cli.main(["train", "folder", "--data", str(tmp_path / "bad.zip"), "--device", "cpu"]) == 2
    assert "bad.zip cannot be read as a zip file" in capsys.readouterr().err
    for name in "abc":
        picture(tmp_path / "d" / f"{name}.png")
    file = zipped(tmp_path / "d", tmp_path / "data.zip")
    content = bytearray(file.read_bytes())
    content[content.index(b"\x89PNG") + 40] ^= 0xFF
    file.write_bytes(bytes(content))
    assert read_pictures(file, SQUARE).names == ["b.png", "c.png"]
    assert "skipped a.png: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "wanted"), [(64, (64, 64)), ("64", (64, 64)), ("64x192", (64, 192)), ("48", (48, 48))]
)
def test_a_size_is_a_number_or_height_by_width(text, wanted):
    assert sides(text) == wanted


@pytest.mark.parametrize("text", ["64x", "a", "64x64x64", "-1", "100", "4", "2048", "64x100"])
def test_sizes_that_no_network_makes_are_refused(text):
    with pytest.raises(ValueError, match="image_size"):
        TrainConfig(dataset="folder", image_size=text)


@pytest.mark.parametrize("flags", [["--image-size", "64"], ["--crop", "none"], ["--mirror"], ["--channels", "1"]])
def test_flags_of_pictures_are_refused_for_other_data(flags, capsys):
    assert cli.main(["train", "discs", *flags]) == 2
    assert flags[0] in capsys.readouterr().err


@pytest.fixture
def run(tmp_path) -> TrainConfig:
    """A run on 40 pictures of two classes, 16x32, with alpha."""
    for i in range(40):
        color = (6 * i, 255 - 6 * i, 9, 255 - i)
        picture(tmp_path / "data" / ("cat" if i % 2 else "dog") / f"{i:02}.png", color, "RGBA", (24, 24))
    preset = PRESETS["folder"][1]
    return dataclasses.replace(
        preset,
        runs=tmp_path / "runs",
        data=tmp_path / "data",
        image_size="16x32",
        device="cpu",
        steps=2,
        log_every=1,
        equilibrium_every=None,
        pictures=PictureConfig(channels=4),
        model=dataclasses.replace(preset.model, width=4, latent_dim=8, conditional=True),
        optim=dataclasses.replace(preset.optim, batch_size=8, augment="ada"),
    )


def trained(config: TrainConfig, **changes: object) -> Trainer:
    trainer = Trainer(dataclasses.replace(config, **changes))
    trainer.train()
    return trainer


def test_a_run_on_pictures_with_alpha_that_are_not_square(run, capsys):
    trainer = trained(run)
    output = capsys.readouterr().out
    assert "data: 40 pictures; 2 classes from folder names: cat, dog\n" in output
    assert trainer.gan.samples(torch.zeros(3, 8)).shape == (3, 4, 16, 32)
    saved = json.loads(trainer.run.config.read_text())
    assert saved["class_names"] == ["cat", "dog"]
    assert TrainConfig.load(trainer.run.config) == run
    report = trainer.run.report.read_text()
    assert "| classes | 2: cat, dog |" in report
    assert "| scores | none: scores need at least 10 held-out pictures, but this run holds out 4, of 40" in report
    assert "No scores: scores need at least 10" in trainer.run.html.read_text()
    assert Image.open(trainer.run.samples).mode == "RGBA"


def test_a_resumed_run_refuses_changed_data_and_says_what_changed(run):
    trained(run)
    picture(run.data / "cat" / "new.png")
    picture(run.data / "dog" / "00.png", "blue")
    (run.data / "cat" / "01.png").unlink()
    again = dataclasses.replace(run, resume=True, steps=4)
    with pytest.raises(DataError, match=r"1 added \(cat/new.png\), 1 removed \(cat/01.png\), 1 changed \(dog/00.png\)"):
        Trainer(again)


def test_a_new_place_or_time_of_the_same_pictures_is_no_change(run):
    trained(run)
    moved = run.data.rename(run.data.with_name("moved"))
    for path in moved.rglob("*.png"):
        path.touch()
    assert trained(run, resume=True, steps=3, data=moved).step == 3


def test_changed_data_can_be_accepted_and_held_out_pictures_stay_held_out(run, capsys):
    before = trained(run)
    kept = set(before.held_out.member_names())
    for i in range(30):
        picture(run.data / "cat" / f"new{i}.png")
    gone = min(kept)
    (run.data / gone).unlink()
    after = trained(run, resume=True, steps=4, data_changed_ok=True)
    assert "the data has changed: 30 added" in capsys.readouterr().out
    assert set(after.held_out.member_names()) == kept - {gone}
    assert after.gan.source.size == 40 + 30 - 1 - 3
    assert trained(run, resume=True, steps=5).step == 5


def test_other_classes_are_refused_even_so(run):
    trained(run)
    (run.data / "cat").rename(run.data / "lion")
    with pytest.raises(DataError, match="the classes are not those of the run"):
        Trainer(dataclasses.replace(run, resume=True, steps=4, data_changed_ok=True))


def test_a_batch_that_is_larger_than_the_data_is_refused_before_anything_is_made(run):
    optim = dataclasses.replace(run.optim, batch_size=64)
    with pytest.raises(DataError, match=r"a batch of 64 needs .* the data has 40: set --batch-size to 40 or less"):
        Trainer(dataclasses.replace(run, optim=optim))
    assert not run.folder.exists()
