"""The formats of a report, made from the file of a real run."""

from __future__ import annotations

import csv
import json
import re

import pytest

from fastgan.bench import html_page, plots, report
from fastgan.bench.record import load

pytest.importorskip("matplotlib")
CASE = "spectral_norm/small/forward"
BAND = {"low": 1e-6, "median": 2e-6, "high": 3e-6}


@pytest.fixture
def found(results):
    return load(results)


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_table_has_the_medians_of_the_file(results, found, capsys):
    assert report.main([str(results)]) == 0
    rows = [cells(line) for line in capsys.readouterr().out.splitlines() if line.startswith("| spectral_norm")]
    medians = [result["seconds"]["median"] * 1e3 for case in found["cases"] for result in case["variants"].values()]
    assert [float(row[2].split()[0]) for row in rows] == pytest.approx(medians, rel=0.01)


def test_the_table_shows_graphs_memory_and_what_was_left_out(found):
    case = found["cases"][0]
    case["left_out"] = {"cuda": "no nvcc"}
    found["not_yet_run"] = ["norm/layer_norm/r1"]
    case["variants"]["fastgan"]["graph"] = {"seconds": BAND, "floor_fraction": 0.25}
    case["variants"]["torch"]["graph"] = {"reason": "cannot be captured"}
    case["variants"]["torch"]["peak_bytes"] = 12_300_000
    del case["variants"]["fastgan"]["ratio"]  # as where the baseline does not fit
    table = report.table(found)
    assert "| 0.002 (0.001 to 0.003) |  | 25.0% |" in table
    assert "| 12.3 | cannot be captured |  |  |" in table
    assert "The floor is the bytes divided by this run's copy bandwidth" in table
    assert table.endswith(f"Left out:\n- {CASE}, cuda: no nvcc\n- norm/layer_norm/r1: not run")
    header, *rows = [cells(line) for line in table.splitlines() if line.startswith("|")]
    assert header[5] == "peak MB"
    assert {len(row) for row in rows} == {len(header)}


def test_the_sheet_has_a_row_a_variant_in_seconds(results, found):
    with results.with_suffix(".csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    variants = [(case["name"], name) for case in found["cases"] for name in case["variants"]]
    assert [(row["case"], row["variant"]) for row in rows] == variants
    result = found["cases"][1]["variants"]["fastgan"]
    assert float(rows[-1]["seconds_median"]) == result["seconds"]["median"]
    assert float(rows[-1]["ratio_high"]) == result["ratio"]["high"]
    assert rows[0]["threads"] == str(found["provenance"]["threads"])


def test_the_markdown_shows_its_pictures_and_where_it_was_measured(results, found):
    text = results.with_suffix(".md").read_text()
    pictures = re.findall(r"!\[.+\]\((.+)\)", text)
    assert pictures == ["result-speed-up.png", "result-roofline.png"]
    for picture in pictures:
        assert (results.parent / picture).read_bytes().startswith(b"\x89PNG")
    for value in (found["provenance"]["torch"], found["provenance"]["system"], str(found["rounds"])):
        assert f"| {value} |" in text


def test_the_page_has_its_pictures_inside_and_needs_no_network(results, found):
    page = results.with_suffix(".html").read_text()
    assert page.count('src="data:image/png;base64,') == 2
    assert not re.search(r"https?://|<script|<link|url\(", page)
    assert CASE in page
    assert found["provenance"]["torch"] in page


def test_the_page_escapes_what_it_is_given(tmp_path):
    page = html_page.page("<b>", [html_page.grid(["<i>"], [["<u>"]]), html_page.properties([["<s>", "&"]])])
    assert not re.search("<[bius]>", page)
    assert "&lt;u&gt;" in page
    assert html_page.picture(tmp_path / "none.png", "") == ""


def stepped(family, pixels, batch, ratio):
    band = {"low": ratio - 0.1, "median": ratio, "high": ratio + 0.1}
    variants = {
        "torch": {"seconds": BAND, "peak_bytes": 2_000_000},
        "fastgan": {"seconds": BAND, "ratio": band, "peak_bytes": 1_000_000},
    }
    empty = dict.fromkeys(("op", "bytes", "operations", "growth", "backend", "floor_seconds"))
    sizes = {"pixels": pixels, "batch": batch}
    return {"name": f"{family}{pixels}", "family": family, "sizes": sizes, "variants": variants, "left_out": {}} | empty


def test_pictures_by_resolution_and_batch_join_the_cases_of_a_family(found):
    found["cases"] = [stepped("a", 256, 8, 3.0), stepped("a", 64, 8, 1.5), stepped("b", 64, 8, 2.0)]
    found["cases"] += [stepped("a", 64, 2, 1.2)]
    figures = plots.figures(found)
    assert set(figures) == {"speed-up", "resolution", "batch", "memory"}
    (axes,) = figures["memory"].picture.axes
    assert axes.get_xscale() == "log"
    assert "logarithmic scale" in axes.get_xlabel()
    assert "logarithmic scale" in figures["memory"].caption
    (axes,) = figures["resolution"].picture.axes
    assert axes.get_lines()[0].get_xydata().tolist() == [[64, 1.5], [64, 1.2], [256, 3.0]]
    panels = [axes for axes in figures["batch"].picture.axes if axes.get_visible()]
    assert [axes.get_title() for axes in panels] == ["a, pixels 64"]


def test_what_is_no_result_is_refused(tmp_path, results, capsys):
    for text, message in (
        ("{", "is not JSON"),
        ("[]", "is not a result of fastgan bench: it has no cases"),
        (json.dumps(json.loads(results.read_text()) | {"schema": 1}), "has schema 1, this version reads 2"),
    ):
        path = tmp_path / "x.json"
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            load(path)
        assert report.main([str(path)]) == 2
        assert message in capsys.readouterr().err


def test_formulas_stay_text_and_backticks_become_code():
    assert html_page.words("`fastgan bench` and <g, v> & more") == (
        "<code>fastgan bench</code> and &lt;g, v&gt; &amp; more"
    )
    assert html_page.words("one ` only <g>") == "one ` only &lt;g&gt;"
    shown = html_page.grid(["a"], [["<g, v>", "`x < y`"]])
    assert "&lt;g, v&gt;" in shown
    assert "<code>x &lt; y</code>" in shown
