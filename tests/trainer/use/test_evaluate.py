from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from fastgan import cli
from fastgan.trainer.data.size import sides
from fastgan.trainer.measure.extractors import TorchScript, check_extractor, load_extractor
from fastgan.trainer.measure.metrics import frechet_distance, inception_score, neighbors
from fastgan.trainer.run import run_data
from fastgan.trainer.use.evaluate import first_size
from fastgan.trainer.use.trained import Trained
from tests.trainer.use.conftest import write_pictures

CPU = torch.device("cpu")


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(99, 99)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(x)  # (N, 3, 3, 3)


class SmallInception(nn.Module):
    """The interface of inception-2015-12-05.pt."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = Layers()
        self.weight = nn.Parameter(torch.randn(5, 27, generator=torch.Generator().manual_seed(0)))
        self.bias = nn.Parameter(torch.tensor([9.0, 0.0, 0.0, 0.0, 0.0]))

    def forward(self, img: Tensor, return_features: bool = False, no_output_bias: bool = False) -> Tensor:
        features = self.layers((img - 128) / 128).flatten(1)
        if return_features:
            return features
        logits = 4 * features @ self.weight.t()
        if not no_output_bias:
            logits = logits + self.bias
        return logits.softmax(1)


class FeaturesOnly(nn.Module):
    def forward(self, img: Tensor, return_features: bool = False) -> Tensor:
        return img.mean([2, 3]) if return_features else img


@pytest.fixture
def inception(tmp_path) -> Path:
    path = tmp_path / "inception-2015-12-05.pt"
    torch.jit.script(SmallInception()).save(str(path))
    return path


def test_the_file_of_inception_sees_pictures_resized_as_clean_fid_does(inception):
    draw = torch.Generator().manual_seed(1)
    images = torch.rand(2, 3, 20, 40, generator=draw) * 2 - 1
    seen = TorchScript(inception, CPU).resized(images)
    assert seen.shape == (2, 3, 299, 299)
    byte = ((images[1, 2] + 1) * 127.5).round().numpy().astype(np.float32)
    wanted = np.asarray(Image.fromarray(byte).resize((299, 299), Image.Resampling.BICUBIC)).clip(0, 255)
    assert np.array_equal(seen[1, 2].numpy(), wanted)
    features = load_extractor(str(inception), CPU)(images)
    assert features.shape == (2, 27)
    assert torch.allclose(features, SmallInception().layers((seen - 128) / 128).flatten(1))


def test_gray_and_transparent_pictures_have_features_too(inception):
    extractor = load_extractor(str(inception), CPU)
    gray = torch.zeros(1, 1, 8, 8)
    clear = torch.cat([torch.zeros(1, 3, 8, 8), torch.full((1, 1, 8, 8), -1.0)], 1)
    assert torch.equal(extractor(gray), extractor(gray.expand(-1, 3, -1, -1)))
    assert torch.equal(extractor(clear), extractor(torch.ones(1, 3, 8, 8)))


def test_gradients_pass_through_its_other_resizing_with_nearly_the_same_features(inception):
    extractor = TorchScript(inception, CPU)
    images = (torch.rand(1, 3, 24, 24) - 0.5).requires_grad_()
    features = extractor.differentiable(images)
    assert (features - extractor(images.detach())).abs().max() < 0.02
    features.sum().backward()
    assert images.grad.abs().max() > 0


class Scalar(nn.Module):
    def forward(self, img: Tensor, return_features: bool = False) -> Tensor:
        return img.flatten(1) if return_features else img.mean()


class OtherInterface(nn.Module):
    def forward(self, img: Tensor) -> Tensor:
        return img.flatten(1)


def test_a_module_without_classes_has_no_probabilities(tmp_path):
    for module in (FeaturesOnly(), Scalar()):
        torch.jit.script(module).save(str(tmp_path / "other.pt"))
        extractor = TorchScript(tmp_path / "other.pt", CPU)
        assert len(extractor(torch.zeros(2, 3, 8, 8))) == 2
        assert extractor.probabilities(torch.zeros(2, 3, 8, 8)) is None


def test_a_module_with_another_interface_is_told_how_it_is_called(tmp_path):
    torch.jit.script(OtherInterface()).save(str(tmp_path / "other.pt"))
    with pytest.raises(ValueError, match=r"must return features \(2, F\).*called with return_features=True"):
        check_extractor(str(tmp_path / "other.pt"), (3, 8, 8), CPU)


def test_probabilities_leave_out_the_bias_of_the_last_layer(inception):
    images = torch.zeros(3, 3, 8, 8)
    found = TorchScript(inception, CPU).probabilities(images)
    pixels = torch.full((3, 3, 299, 299), 128.0)
    assert torch.allclose(found, SmallInception()(pixels, no_output_bias=True), atol=1e-5)


@pytest.mark.parametrize("content", [None, b"text"])
def test_a_file_that_is_missing_or_is_not_torchscript_is_one_line(run, config, tmp_path, capsys, content):
    if content is not None:
        (tmp_path / "no.pt").write_bytes(content)
    capsys.readouterr()
    assert cli.main(["evaluate", str(config.folder), "--extractor", str(tmp_path / "no.pt")]) == 2
    error = capsys.readouterr().err
    assert ("does not exist" if content is None else "is not a TorchScript file") in error
    assert error.count("\n") == 1


def test_a_runs_scores_are_against_held_out_pictures_with_n_extractor_digest_and_floor(run, config, inception, capsys):
    assert cli.main(["evaluate", str(config.folder), "--extractor", str(inception), "--device", "cpu"]) == 0
    output = capsys.readouterr().out
    found = json.loads((config.folder / "evaluation.json").read_text())
    digest = hashlib.sha256(inception.read_bytes()).hexdigest()[:16]
    assert (found["n"], found["extractor"], found["digest"]) == (12, "inception-2015-12-05", digest)
    assert found["against"] == "12 pictures that the run held out"
    assert found["FID-inception-2015-12-05"] > found["floor"]["FID-inception-2015-12-05"] > 0
    assert {"precision", "recall", "density", "coverage", "IS"} <= found.keys()
    assert "5,000 samples were asked for, but there are only 12 pictures" in output
    assert digest in output


def test_a_run_that_was_moved_still_holds_out_the_same_pictures_after_its_data_grew(run, config, tmp_path):
    write_pictures(config.data / "more", 40, seed=7)
    kept = set(run.held_out.member_names())
    moved = config.folder.rename(tmp_path / "moved")
    _, held_out = run_data(config, moved, CPU)
    assert set(held_out.member_names()) == kept
    assert cli.main(["evaluate", str(moved), "--device", "cpu"]) == 0
    assert json.loads((moved / "evaluation.json").read_text())["n"] == len(kept) == 12


def test_training_pictures_are_used_only_when_asked_and_named(run, config):
    assert cli.main(["evaluate", str(config.folder), "--training", "--samples", "30", "--device", "cpu"]) == 0
    found = json.loads((config.folder / "evaluation.json").read_text())
    assert found["against"].startswith("30 pictures that the run trained on")
    assert "FD-RandomConv" in found


def test_pictures_that_the_run_trained_on_are_named_wherever_they_are(run, config, tmp_path):
    other = write_pictures(tmp_path / "other", 20, seed=9)
    for number, path in enumerate(sorted(config.data.rglob("*.png"))[:24]):
        shutil.copy(path, other / f"copy{number}.png")
    held_out = set(run.held_out.member_names())
    copied = sum(name not in held_out for name in names(config.data)[:24])
    assert cli.main(["evaluate", str(config.folder), "--against", str(other), "--device", "cpu"]) == 0
    found = json.loads((config.folder / "evaluation.json").read_text())
    assert 0 < copied <= 24
    assert f"44 pictures of {other}, of which the run trained on {copied}, which favors" in found["against"]


def test_samples_have_the_classes_of_the_reals(run, config, monkeypatch):
    """As many of each, or a generator that makes both classes well scores badly on data where one is rare."""
    seen = []
    whole = Trained.samples

    def samples(trained, z, labels=None):
        seen.append(labels)
        return whole(trained, z, labels)

    monkeypatch.setattr(Trained, "samples", samples)
    assert cli.main(["evaluate", str(config.folder), "--device", "cpu"]) == 0
    held_out = [name.split("/")[0] for name in run.held_out.member_names()]
    assert torch.bincount(seen[0]).tolist() == [held_out.count("cat"), held_out.count("dog")]
    record = config.folder / "data.json"
    content = json.loads(record.read_text())
    content["pictures"] = {f"{n}.png": f"{n:x} {'cat' if n < 95 else 'dog'}" for n in range(100)}
    record.write_text(json.dumps(content))
    flags = ["--against", str(config.data), "--device", "cpu"]
    assert cli.main(["evaluate", str(config.folder), *flags]) == 0
    assert torch.bincount(seen[1])[0] > 100


def names(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*.png"))]


def test_folders_are_compared_without_a_run(tmp_path, capsys):
    same = write_pictures(tmp_path / "same", 40, seed=1)
    real = write_pictures(tmp_path / "real", 90, seed=2)
    other = write_pictures(tmp_path / "other", 40, seed=3, shift=55)
    scores = []
    for folder in (same, other):
        flags = ["--images", str(folder), "--against", str(real), "--out", str(tmp_path / "found.json")]
        assert cli.main(["evaluate", *flags, "--device", "cpu"]) == 0
        scores.append(json.loads((tmp_path / "found.json").read_text()))
    assert scores[0]["n"] == 40
    assert "at 32 x 16 pixels" in scores[0]["against"]
    assert scores[0]["FD-RandomConv"] < 0.5 * scores[1]["FD-RandomConv"]
    assert scores[0]["FD-RandomConv"] < 2 * scores[0]["floor"]["FD-RandomConv"]
    capsys.readouterr()
    assert cli.main(["evaluate", "--images", str(same), "--against", str(tmp_path / "none")]) == 2
    assert "none cannot be read" in capsys.readouterr().err


def test_unreadable_samples_are_skipped_and_the_split_is_named(tmp_path, capsys):
    samples = write_pictures(tmp_path / "samples", 12, seed=1)
    (samples / "cat" / "000.png").write_bytes(b"\x89PNG")
    for split in ("train", "val"):
        write_pictures(tmp_path / "real" / split, 12, seed=2)
    flags = ["--images", str(samples), "--against", str(tmp_path / "real"), "--device", "cpu"]
    assert cli.main(["evaluate", *flags]) == 0
    assert f"12 pictures of {tmp_path / 'real'}, the split train, not val (--split NAME)" in capsys.readouterr().out
    assert cli.main(["evaluate", *flags, "--split", "val"]) == 0
    assert "the split val, not train" in capsys.readouterr().out
    for path in samples.rglob("*.png"):
        path.write_bytes(b"\x89PNG")
    assert cli.main(["evaluate", *flags]) == 2
    assert "samples contains no pictures that can be read, of 13" in capsys.readouterr().err


def test_the_size_of_samples_is_that_of_the_first_one_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by a quarter
    Image.new("RGB", (20, 10)).save(tmp_path / "a.jpg", exif=exif)
    assert first_size(tmp_path) == (20, 10)


def test_a_file_that_cannot_be_written_is_named_before_the_scores(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("fastgan.trainer.use.evaluate.sets_of_folders", None)  # an attempt to call it fails
    (tmp_path / "file").touch()
    for out, says in ((tmp_path, "is a folder: try"), (tmp_path / "file" / "found.json", "cannot be written to")):
        assert cli.main(["evaluate", "--images", "a", "--against", "b", "--out", str(out)]) == 2
        assert says in capsys.readouterr().err


def test_pictures_of_any_size_are_compared_and_networks_need_multiples():
    assert sides(17, networks=False) == (17, 17)
    assert sides("5x300", networks=False) == (5, 300)
    for wrong in ("0", "3x0", "x"):
        with pytest.raises(ValueError, match="image_size"):
            sides(wrong, networks=False)
    with pytest.raises(ValueError, match="multiple of 4"):
        sides(17)


@pytest.mark.parametrize(
    "flags",
    [
        ["run", "--image-size", "32"],
        ["run", "--channels", "3", "--against", "a"],
        ["run", "--crop", "center"],
        ["run", "--split", "val"],
        ["--images", "a", "--against", "b", "--best"],
        ["--images", "a", "--against", "b", "--mirror"],
    ],
)
def test_a_flag_that_would_have_no_effect_is_refused(flags, capsys):
    assert cli.main(["evaluate", *flags]) == 2
    name = next(flag for flag in reversed(flags) if flag.startswith("--") and flag != "--against")
    assert name in capsys.readouterr().err


@pytest.mark.parametrize("flags", [[], ["--images", "a"], ["run", "--images", "a", "--against", "b"]])
def test_what_to_compare_must_be_said(flags, capsys):
    assert cli.main(["evaluate", *flags]) == 2
    assert "--images" in capsys.readouterr().err


def test_the_frechet_distance_is_scipys():
    linalg = pytest.importorskip("scipy.linalg", reason="needs scipy")
    draw = torch.Generator().manual_seed(0)
    real = torch.randn(300, 6, generator=draw, dtype=torch.float64)
    fake = torch.randn(200, 6, generator=draw, dtype=torch.float64) @ torch.randn(6, 6, generator=draw).double() + 1
    c_r, c_f = (np.cov(x.numpy(), rowvar=False) for x in (real, fake))
    root = linalg.sqrtm(c_r @ c_f).real
    wanted = float((real.mean(0) - fake.mean(0)).square().sum()) + np.trace(c_r + c_f - 2 * root)
    assert frechet_distance(real, fake) == pytest.approx(wanted, rel=1e-8)


def test_the_inception_score_is_one_for_equal_answers_and_the_number_of_classes_for_sure_ones():
    assert inception_score(torch.full((50, 4), 0.25)) == pytest.approx((1.0, 0.0))
    assert inception_score(torch.eye(4).repeat(25, 1), splits=5) == pytest.approx((4.0, 0.0))
    mixed = torch.tensor([[0.9, 0.1], [0.1, 0.9]])
    assert inception_score(mixed, splits=1)[0] == pytest.approx(float(np.exp(0.9 * np.log(1.8) + 0.1 * np.log(0.2))))


def test_precision_is_the_share_of_samples_among_the_reals_in_any_number_of_parts(monkeypatch):
    draw = torch.Generator().manual_seed(0)
    real = torch.randn(200, 3, generator=draw)
    fake = torch.cat([torch.randn(60, 3, generator=draw), 50 + torch.randn(40, 3, generator=draw)])
    whole = neighbors(real, fake)
    assert 0.5 < whole.precision <= 0.6
    monkeypatch.setattr("fastgan.trainer.measure.metrics.ROWS", 7)
    assert neighbors(real, fake) == pytest.approx(whole)
