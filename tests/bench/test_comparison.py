from __future__ import annotations

import copy
import json

import pytest

from fastgan import cli
from fastgan.bench import comparison, timing
from fastgan.bench.record import load, save

CASE = "spectral_norm/small/forward"


@pytest.fixture
def pair(results):
    """Return two equal results with known bands."""
    found = load(results)
    for case in found["cases"]:
        case["variants"]["fastgan"]["ratio"] = {"low": 3.8, "median": 4.0, "high": 4.2}
        case["variants"]["fastgan"]["peak_bytes"] = 1_000_000
    return found, copy.deepcopy(found)


def verdicts(old, new):
    return {(change.case, change.what): change.verdict for change in comparison.changes(old, new) if change.verdict}


def test_a_run_is_equal_to_itself(pair):
    assert verdicts(*pair) == {}
    assert not comparison.regressed(comparison.changes(*pair))


@pytest.mark.parametrize(
    ("band", "verdict"),
    [
        ((3.6, 3.7, 3.9), None),  # slower, within the noise
        ((3.5, 3.6, 3.7), comparison.REGRESSION),
        ((2.0, 4.0, 9.0), None),
        ((4.3, 4.4, 4.5), comparison.IMPROVEMENT),
    ],
)
def test_a_change_counts_where_the_bands_do_not_touch(pair, band, verdict):
    old, new = pair
    new["cases"][0]["variants"]["fastgan"]["ratio"] = dict(zip(("low", "median", "high"), band, strict=True))
    assert verdicts(old, new) == ({(CASE, "speed-up"): verdict} if verdict else {})


def test_a_machine_that_is_slower_as_a_whole_is_no_regression(pair):
    old, new = pair
    for case in new["cases"]:
        for result in case["variants"].values():
            result["seconds"] = {quantile: 3 * value for quantile, value in result["seconds"].items()}
    found = comparison.changes(old, new)
    assert not comparison.regressed(found)
    assert [change.seconds for change in found if change.what == "speed-up"] == pytest.approx([3.0] * 4)


@pytest.mark.parametrize(("peak", "verdict"), [(1_005_000, None), (1_100_000, comparison.REGRESSION)])
def test_more_memory_at_the_peak_is_a_regression(pair, peak, verdict):
    old, new = pair
    new["cases"][1]["variants"]["fastgan"]["peak_bytes"] = peak
    assert verdicts(old, new) == ({(f"{CASE}_backward", "peak MB"): verdict} if verdict else {})


def test_a_graphs_speed_is_compared_by_itself(pair):
    old, new = pair
    for result, median in ((old, 5.0), (new, 3.0)):
        band = {"low": median, "median": median, "high": median}
        result["cases"][0]["variants"]["fastgan"]["graph"] = {"seconds": band, "ratio": band}
    assert verdicts(old, new) == {(CASE, "speed-up, CUDA graph"): comparison.REGRESSION}


@pytest.mark.parametrize(
    ("left_out", "reason"), [({"fastgan": "CUDA out of memory"}, "CUDA out of memory"), ({}, "not measured")]
)
def test_a_variant_that_can_no_longer_be_measured_is_a_regression(pair, left_out, reason):
    old, new = pair
    del new["cases"][0]["variants"]["fastgan"]
    new["cases"][0]["left_out"] = left_out
    assert verdicts(old, new) == {(CASE, "speed-up"): comparison.REGRESSION}
    assert comparison.regressed(comparison.changes(old, new))
    told = comparison.table(comparison.changes(old, new))
    assert f"| {CASE} | fastgan | speed-up | 4 | none |  |  | REGRESSION: {reason}" in told
    assert "1 regression and 0 improvements" in told


def test_a_baseline_that_can_no_longer_be_measured_is_a_regression(pair):
    old, new = pair
    variants = new["cases"][0]["variants"]
    del variants["torch"]
    for result in variants.values():
        del result["ratio"]
    new["cases"][0]["left_out"] = {"torch": "CUDA out of memory"}
    assert verdicts(old, new) == {(CASE, "speed-up"): comparison.REGRESSION}
    assert verdicts(new, old) == {}


def test_a_compiled_baseline_is_missed_only_where_it_was_asked_for(pair):
    old, new = pair
    old["cases"][0]["variants"]["torch.compile"] = copy.deepcopy(old["cases"][0]["variants"]["fastgan"])
    assert verdicts(old, new) == {}
    new["cases"][0]["left_out"] = {"torch.compile": "InductorError: no compiler"}
    assert verdicts(old, new) == {(CASE, "speed-up"): comparison.REGRESSION}


@pytest.mark.parametrize("now", [{"graph": {"reason": "operation not permitted"}}, {}])
@pytest.mark.parametrize("variant", ["torch", "fastgan"])
def test_a_graph_that_can_no_longer_be_captured_is_a_regression(pair, variant, now):
    old, new = pair
    band = {"low": 5.0, "median": 5.0, "high": 5.0}
    old["cases"][0]["variants"][variant]["graph"] = {"seconds": band, "ratio": band}
    new["cases"][0]["variants"][variant] |= now
    assert verdicts(old, new) == {(CASE, "speed-up, CUDA graph"): comparison.REGRESSION}
    reason = now["graph"]["reason"] if now else "not measured"
    assert f"| none |  |  | REGRESSION: {reason} |" in comparison.table(comparison.changes(old, new))
    assert verdicts(new, old) == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda new: new["provenance"].update(device="another"), "has device .*, this run has another: they cannot be"),
        (lambda new: new["provenance"].update(threads=64), "has threads 1, this run has 64: they cannot be compared"),
        (
            lambda new: new["provenance"].update(freed_memory="given back"),
            "old.json has freed memory kept, this run has it given back: they cannot be compared",
        ),
        (lambda new: new["cases"][0].update(name="x"), f"other cases: it lacks x; this run lacks {CASE}"),
        (lambda new: new["cases"].pop(), f"other cases: this run lacks {CASE}_backward"),
        (lambda new: new["not_yet_run"].append("y"), "other cases: it lacks y"),
    ],
)
def test_what_cannot_be_compared_is_refused(pair, change, message):
    old, new = pair
    change(new)
    with pytest.raises(ValueError, match=message):
        comparison.refuse_others(old, "old.json", new)


def test_a_regression_is_told_first_and_is_the_exit_status(results, tmp_path, capsys):
    old = load(results)
    for case in old["cases"]:
        fast = case["variants"]["fastgan"]
        fast["ratio"] = {quantile: 1000 * value for quantile, value in fast["ratio"].items()}
    before = tmp_path / "old.json"
    save(old, before)
    # The run is complete: nothing is measured again.
    assert cli.main(["bench", "--resume", str(results), "--compare", str(before)]) == 1
    _, told = capsys.readouterr().out.split(f"Against {before}:")
    rows = [line for line in told.splitlines() if line.startswith("| spectral_norm")]
    assert [comparison.REGRESSION in row for row in rows] == [True, True, False, False]
    assert "2 regressions and 0 improvements" in told
    assert cli.main(["bench", "--resume", str(results), "--compare", str(results)]) == 0
    assert "0 regressions and 0 improvements" in capsys.readouterr().out


def test_a_part_of_a_suite_is_compared_with_the_whole_after_it_was_resumed(results, tmp_path, capsys):
    whole = load(results)
    whole["cases"].append({**whole["cases"][0], "name": "norm/layer_norm/r1"})
    before = tmp_path / "whole.json"
    save(whole, before)
    assert cli.main(["bench", "--resume", str(results), "--compare", str(before)]) == 0
    assert "norm/layer_norm" not in capsys.readouterr().out
    whole["cases"].append({**whole["cases"][0], "name": "norm/small/gone"})  # which the pattern asks for
    save(whole, before)
    assert cli.main(["bench", "--resume", str(results), "--compare", str(before)]) == 2
    assert "other cases: this run lacks norm/small/gone" in capsys.readouterr().err


def test_other_cases_are_refused_before_anything_is_measured(results, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(timing, "in_turns", None)
    monkeypatch.setattr(timing, "copy_bandwidth", lambda device, timer: 1e9)
    monkeypatch.setattr(timing, "matmul_rate", lambda device, timer: 1e9)
    path = tmp_path / "new.json"
    arguments = ["bench", "--case", "norm/*", "--device", "cpu", "--output", str(path), "--compare", str(results)]
    assert cli.main(arguments) == 2
    assert f"{results} has other cases: it lacks norm/layer_norm/r1" in capsys.readouterr().err
    assert not path.exists()
    path.write_text(json.dumps({"cases": []}))
    assert cli.main([*arguments[:-1], str(path)]) == 2
    assert "has schema None, this version reads 2" in capsys.readouterr().err
