from __future__ import annotations

import dataclasses
import re
from html.parser import HTMLParser

import pytest
import torch

from fastgan.trainer.loop import Trainer
from fastgan.trainer.report.charts import counted, line_chart
from fastgan.trainer.report.gallery import interpolations, nearest_reals

VOID = {"meta", "img", "br", "line", "circle", "polyline"}


class Page(HTMLParser):
    """The references and texts of a page, and whether its tags are balanced."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.tags: list[str] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [
            value for key, value in attrs if key in ("src", "href", "srcset", "data", "action", "xlink:href")
        ]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture
def no_plot(monkeypatch):
    monkeypatch.setattr("fastgan.trainer.report.pictures.save_losses", lambda metrics, path: None)


def trained(config, **changes):
    trainer = Trainer(dataclasses.replace(config, **changes))
    trainer.train()
    return trainer


def test_the_report_is_one_file_that_needs_no_other(config, no_plot):
    run = trained(config, dataset="discs", data=None, equilibrium_every=3, scored=50).run
    text = run.html.read_text()
    page = Page(text)
    assert page.open == []
    assert len(page.links) >= 4
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert "url(" not in text
    assert "@import" not in text
    assert page.tags.count("svg") == 8
    words = " ".join(page.words)
    for expected in ("tiny", "Duality gap", "Diversity", "Held-out", "KID-RandomConv", "floor", "96 real samples"):
        assert expected in words
    assert "prefers-color-scheme: dark" in text


def test_an_alarm_stands_in_the_report_with_its_remedy(ring8_config, no_plot):
    optim = dataclasses.replace(ring8_config.optim, d_lr=1.0, g_lr=1.0)
    words = " ".join(Page(trained(ring8_config, optim=optim, steps=8, log_every=1).run.html.read_text()).words)
    assert "divergence" in words
    assert "lower --d-lr and --g-lr" in words


@pytest.mark.parametrize("steps", [3, 8])
def test_a_run_too_short_to_judge_says_so_instead_of_that_nothing_went_wrong(
    ring8_config, no_plot, monkeypatch, capsys, steps
):
    monkeypatch.setattr("fastgan.trainer.report.page.SHORT", 8)
    run = trained(ring8_config, steps=steps).run
    words, text = " ".join(Page(run.html.read_text()).words), run.report.read_text()
    for shown in (words, text):
        assert (f"Too short to judge: {steps} steps" in shown) == (steps < 8)
        assert ("None yet." in shown) == (steps < 8)
    assert ("no vanishing gradient" in words) == (steps == 8)
    assert "computing the final scores and writing the report" in capsys.readouterr().out


def test_adas_probability_is_recorded_and_drawn(config, no_plot):
    trainer = trained(
        config, dataset="discs", data=None, optim=dataclasses.replace(config.optim, augment="ada"), steps=4, scored=50
    )
    trainer.gan.augment.p.fill_(0.25)
    assert trainer.diagnostics.observe(5)["augment_p"] == 0.25
    assert [record["augment_p"] for record in trainer.run.read_metrics() if "d_loss" in record] == [0.0, 0.0]
    assert "ADA" in Page(trainer.run.html.read_text()).words


def test_names_are_escaped(ring8_config, no_plot):
    text = trained(ring8_config, name="<b>&").run.html.read_text()
    assert "<h1>&lt;b&gt;&amp;</h1>" in text


class TestCharts:
    def test_a_line_rises_from_the_lower_left_to_the_upper_right(self):
        svg = line_chart("t", {"a": [(0, 0.0), (10, 5.0)]}, unit="u")
        points = svg.split('points="')[1].split('"')[0].split()
        (x0, y0), (x1, y1) = (map(float, point.split(",")) for point in points)
        assert x0 < x1
        assert y0 > y1

    def test_values_that_cannot_be_drawn_are_left_out(self):
        svg = line_chart("t", {"a": [(0, 1e-3), (1, 0.0), (2, float("nan")), (3, 10.0)]}, log=True, unit="u")
        assert svg.split('points="')[1].split('"')[0].count(",") == 2
        assert line_chart("t", {"a": [(0, float("nan"))]}, unit="u") == ""

    @pytest.mark.parametrize("values", [(1.0, 1.0), (0.0, 0.0), (-3e-9, 2e-9), (1e6, 1e7)])
    def test_its_ticks_are_few(self, values):
        svg = line_chart("t", {"a": list(enumerate(values))}, unit="u")
        assert 1 <= svg.count('text-anchor="end"') <= 8

    @pytest.mark.parametrize("value", [0.08, -3.0, 0.0, 1e-5, 123456.0])
    def test_a_single_value_stands_between_ticks(self, value):
        svg = line_chart("t", {"a": [(19, value)]}, unit="u")
        ticks = [float(y) for y in re.findall(r'class="grid" x1="56" x2="346" y1="([\d.]+)"', svg)]
        (point,) = re.findall(r'<circle class="s0" cx="[\d.]+" cy="([\d.]+)"', svg)
        assert len(ticks) >= 2
        assert min(ticks) <= float(point) <= max(ticks)


class TestGallery:
    @pytest.fixture
    def gan(self, config):
        return Trainer(config).gan

    def test_a_row_starts_and_ends_at_its_latents_and_moves_little_by_little(self, gan):
        rows = interpolations(gan, 0, rows=2, columns=9).view(2, 9, -1)
        start, end = torch.randn(2, 2, gan.latent_dim, generator=torch.Generator().manual_seed(0))
        assert torch.allclose(rows[:, 0], gan.samples(start).flatten(1), atol=1e-5)
        assert torch.allclose(rows[:, -1], gan.samples(end).flatten(1), atol=1e-5)
        steps = rows.diff(dim=1).norm(dim=2)
        whole = (rows[:, -1] - rows[:, 0]).norm(dim=1, keepdim=True)
        assert float((steps / whole).max()) < 0.5

    def test_a_copied_image_is_its_own_nearest_neighbor(self, gan):
        copies = gan.source.fork(0).next(3)
        found = nearest_reals(gan, copies, 0, count=2).view(3, 3, *copies.shape[1:])
        assert torch.equal(found[:, 0], copies)
        assert torch.equal(found[:, 1], copies)
        assert not torch.equal(found[:, 2], copies)


def test_a_chart_has_titles_on_its_axes_and_steps_in_few_digits():
    chart = line_chart("Norms", {"d": [(0, 0.1), (90_000, 2.0), (179_584, 30.0)]}, log=True, unit="norm")
    words = Page(chart).words
    assert "generator step" in words
    assert "norm, logarithmic" in words
    assert {"50k", "100k", "150k"} <= set(words)
    assert "179584" not in chart
    assert {"0.1", "1", "10", "100"} <= set(words)


@pytest.mark.parametrize(
    ("number", "text"), [(950, "950"), (1500, "1.5k"), (12_000, "12k"), (179_584, "180k"), (2e6, "2M"), (0, "0")]
)
def test_counts_have_few_digits(number, text):
    assert counted(number) == text
