from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fastgan import cli
from fastgan.bench import provenance, report, run

CASE = "spectral_norm/small/forward"


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A real run, small and short, through the command line."""
    path = tmp_path_factory.mktemp("bench") / "folder" / "result.json"
    assert run.main(["--case", "*/small/*", "--device", "cpu", "--rounds", "2", "--output", str(path)]) == 0
    return path


def test_a_result_says_where_it_came_from_and_what_was_measured(results):
    found = json.loads(results.read_text())
    about = found["provenance"]
    assert {"device", "cpu", "threads", "torch", "triton", "fastgan", "commit", "dirty", "date"} <= about.keys()
    assert about["threads"] == torch.get_num_threads()
    assert about["command"] == "fastgan bench --suite ops --device cpu --rounds 2 --case '*/small/*'"
    assert found["not_yet_run"] == []
    assert [case["name"] for case in found["cases"]] == [CASE, f"{CASE}_backward"]
    for case in found["cases"]:
        assert list(case["variants"]) == ["torch", "reference", "fastgan"]
        assert case["floor_seconds"] == pytest.approx(case["bytes"] / found["copy_bandwidth"])
        base = case["variants"]["torch"]["seconds"]["median"]
        for result in case["variants"].values():
            assert 0 < result["seconds"]["low"] <= result["seconds"]["median"] <= result["seconds"]["high"]
            assert result["ratio_of_medians"] == pytest.approx(base / result["seconds"]["median"])
            assert result["floor_fraction"] == pytest.approx(case["floor_seconds"] / result["seconds"]["median"])
            assert result["error"] <= case["tolerance"]


def test_the_table_and_the_picture_are_made_from_the_file(results, capsys):
    pytest.importorskip("matplotlib")
    picture = results.with_suffix(".png")
    assert report.main([str(results), str(picture)]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| spectral_norm")]
    medians = [
        result["seconds"]["median"] * 1e3
        for case in json.loads(results.read_text())["cases"]
        for result in case["variants"].values()
    ]
    assert [float(row.split("|")[3].split()[0]) for row in rows] == pytest.approx(medians, rel=0.01)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_table_shows_graphs_and_what_was_left_out(results):
    found = json.loads(results.read_text())
    case = found["cases"][0]
    case["left_out"] = {"cuda": "no nvcc"}
    seconds = {"low": 1e-6, "median": 2e-6, "high": 3e-6}
    case["variants"]["fastgan"]["graph"] = {"seconds": seconds, "floor_fraction": 0.25}
    case["variants"]["torch"]["graph"] = {"reason": "cannot be captured"}
    table = report.table(found)
    assert "| 0.002 (0.001 to 0.003) |  | 25.0% |" in table
    assert "| cannot be captured |  |  |" in table
    assert table.endswith(f"Left out:\n- {CASE}, cuda: no nvcc")
    widths = {row.count("|") for row in table.splitlines() if row.startswith("|")}
    assert len(widths) == 1


def test_what_was_measured_is_on_disk_before_the_next_case_fails(tmp_path, monkeypatch):
    measured = {"name": "first", "variants": {}}

    def measure(case, *others):
        if case is not chosen[0]:
            raise RuntimeError("the second case fails")
        return measured

    chosen = run.choose_cases("ops", "*/small/*", torch.device("cpu"))
    monkeypatch.setattr(run, "measure", measure)
    monkeypatch.setattr(run.timing, "copy_bandwidth", lambda device, timer: 1.0)
    path = tmp_path / "result.json"
    with pytest.raises(RuntimeError, match="second"):
        run.run(chosen, torch.device("cpu"), 1, command="", path=path)
    found = json.loads(path.read_text())
    assert found["cases"] == [measured]
    assert found["not_yet_run"] == [chosen[1].name]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "stairs"], "suite must be one of ops, steps, got 'stairs'"),
        (["--case", "spectral_norm/medium", "--device", "cpu"], "matches 'spectral_norm/medium': choose from spectral"),
        (["--case", "*/large/*", "--device", "cpu"], "no case of ops for cpu matches '*/large/*'"),
        (["--device", "tpu"], "device must be auto, cpu or cuda, got 'tpu'"),
    ],
)
def test_what_is_unknown_is_refused_in_one_line(arguments, message, capsys):
    assert cli.main(["bench", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_is_refused_where_there_is_none():
    with pytest.raises(ValueError, match="device cuda was asked for, but PyTorch sees no CUDA device"):
        run.main(["--device", "cuda"])


def test_a_run_has_at_least_one_round(capsys):
    with pytest.raises(SystemExit):
        run.main(["--rounds", "0"])
    assert "must be at least 1, got 0" in capsys.readouterr().err


def test_results_go_to_a_folder_of_the_device_and_a_file_of_the_commit(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(provenance, "cpu_name", lambda: "Some(R) CPU @ 2.0GHz")
    name = f"some-r-cpu-2-0ghz-{torch.get_num_threads()}-threads"
    monkeypatch.setattr(run, "commit_of", lambda folder: ("0123456789ab", False))
    assert run.output_path(None, cpu) == run.ROOT / "benchmarks" / "results" / name / "0123456789ab.json"
    assert run.output_path(Path("here"), cpu) == Path("here") / name / "0123456789ab.json"
    assert run.output_path(Path("here/x.json"), cpu) == Path("here/x.json")
    monkeypatch.setattr(run, "commit_of", lambda folder: (None, None))
    assert run.output_path(None, cpu) == Path("fastgan-bench") / name / "unknown.json"


def test_the_commit_is_that_of_a_checkout_of_fastgan_and_of_nothing_else(tmp_path):
    assert provenance.commit_of(tmp_path) == (None, None)


def test_the_environment_that_is_kept_names_no_folders(monkeypatch):
    monkeypatch.setenv("LD_PRELOAD", "/opt/lib/libfast.so:/opt/lib/libother.so")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.setenv("SECRET", "x")
    kept = provenance.provenance(torch.device("cpu"), "")["environment"]
    assert kept["LD_PRELOAD"] == "libfast.so:libother.so"
    assert kept["OMP_NUM_THREADS"] == "2"
    assert "SECRET" not in kept
