from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
import torch

from fastgan import cli
from fastgan.bench import measure, provenance, run, timing
from fastgan.bench.cases import CASES, COMPILED_ON_A_CPU, SUITES

CASE = "spectral_norm/small/forward"


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
        assert case["growth"] is None
        assert case["floor_seconds"] == pytest.approx(case["bytes"] / found["copy_bandwidth"])
        base = case["variants"]["torch"]["seconds"]["median"]
        for result in case["variants"].values():
            assert 0 < result["seconds"]["low"] <= result["seconds"]["median"] <= result["seconds"]["high"]
            assert result["ratio_of_medians"] == pytest.approx(base / result["seconds"]["median"])
            assert result["floor_fraction"] == pytest.approx(case["floor_seconds"] / result["seconds"]["median"])
            assert result["error"] <= case["tolerance"]


class Broken(Exception):
    pass


@pytest.fixture
def measured(monkeypatch):
    """Replace the measurement by one that takes no time and fails where the test requests it."""
    fails: set[str] = set()

    def instead(case, device, results, **options):
        if case.name in fails:
            raise Broken(case.name)
        quantiles = {"low": 1.0, "median": 1.0, "high": 1.0}
        variants = {name: {"seconds": quantiles, "ratio": quantiles} for name in ("torch", "fastgan")}
        empty = dict.fromkeys(("op", "dtype", "backend", "bytes", "operations", "growth", "floor_seconds"))
        return {"name": case.name, "family": "", "sizes": {}, "variants": variants, "left_out": {}} | empty

    monkeypatch.setattr(measure, "measure", instead)
    monkeypatch.setattr(timing, "copy_bandwidth", lambda device, timer: 1e9)
    monkeypatch.setattr(timing, "matmul_rate", lambda device, timer: 1e9)
    return fails


ARGUMENTS = ["--case", "*/small/*", "--device", "cpu"]


def test_an_interrupted_run_goes_on_where_it_stopped(measured, tmp_path, capsys):
    path = tmp_path / "result.json"
    measured.add(f"{CASE}_backward")
    with pytest.raises(Broken):
        run.main([*ARGUMENTS, "--output", str(path)])
    found = json.loads(path.read_text())
    assert [case["name"] for case in found["cases"]] == [CASE]
    assert found["not_yet_run"] == [f"{CASE}_backward"]
    measured.clear()
    assert run.main(["--resume", str(path)]) == 0
    resumed = json.loads(path.read_text())
    assert [case["name"] for case in resumed["cases"]] == [CASE, f"{CASE}_backward"]
    assert resumed["not_yet_run"] == []
    assert resumed["provenance"] == found["provenance"]
    assert "2/2" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [path]


def test_control_c_says_how_to_go_on(measured, monkeypatch, tmp_path, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(measure, "measure", interrupted)
    path = tmp_path / "result.json"
    assert run.main([*ARGUMENTS, "--output", str(path)]) == 130
    assert f"continue with: fastgan bench --resume {path}" in capsys.readouterr().err
    assert len(json.loads(path.read_text())["not_yet_run"]) == 2


def test_a_report_without_matplotlib_is_refused_before_anything_is_measured(measured, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    path = tmp_path / "result.json"
    assert cli.main(["bench", *ARGUMENTS, "--output", str(path), "--report"]) == 2
    assert capsys.readouterr().err == "fastgan bench needs matplotlib: pip install 'fastgan[train]'\n"
    assert not path.exists()


def test_no_case_begins_after_the_minutes_that_are_given(measured, tmp_path, capsys):
    path = tmp_path / "result.json"
    assert run.main([*ARGUMENTS, "--output", str(path), "--minutes", "0"]) == 0
    assert json.loads(path.read_text())["not_yet_run"] == [CASE, f"{CASE}_backward"]
    captured = capsys.readouterr()
    assert "time is up, 2 cases did not run" in captured.err
    assert f"- {CASE}: not run" in captured.out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"commit": "0123456789ab"}, "has commit 0123456789ab, this run has"),
        ({"device": "another CPU"}, "has device another CPU, this run has"),
        ({"torch": "2.0.0"}, "has torch 2.0.0, this run has"),
    ],
)
def test_a_result_goes_on_only_under_the_conditions_that_it_began_with(results, tmp_path, change, message, capsys):
    found = json.loads(results.read_text())
    found["provenance"] |= change
    path = tmp_path / "other.json"
    path.write_text(json.dumps(found))
    assert cli.main(["bench", "--resume", str(path)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "freed", "calls"),
    [((), "kept", 2), (("--give-memory-back",), "given back", 0)],
    ids=["kept", "given back"],
)
def test_freed_memory_is_kept_unless_asked_otherwise_and_resuming_does_as_the_file_says(
    flags, freed, calls, measured, tmp_path, monkeypatch
):
    kept = []
    monkeypatch.setattr(run, "keep_freed_memory", lambda: kept.append(True))
    path = tmp_path / "result.json"
    assert run.main([*ARGUMENTS, *flags, "--minutes", "0", "--output", str(path)]) == 0
    about = json.loads(path.read_text())["provenance"]
    assert about["freed_memory"] == freed
    assert about["command"].endswith("--give-memory-back") == bool(flags)
    assert run.main(["--resume", str(path)]) == 0
    assert len(kept) == calls
    with pytest.raises(ValueError, match="leave out --give-memory-back"):
        run.main(["--give-memory-back", "--resume", str(path)])


def test_a_bar_is_shown_where_somebody_watches(monkeypatch):
    pytest.importorskip("tqdm")

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    assert list(measure.with_progress(["first", "second"], done=1)) == ["first", "second"]
    assert "first: " in terminal.getvalue()
    assert "/3" in terminal.getvalue()


def test_what_fails_is_passed_over_where_that_is_asked_for(measured, tmp_path, capsys):
    path = tmp_path / "result.json"
    measured.add(CASE)
    assert run.main([*ARGUMENTS, "--keep-going", "--output", str(path)]) == 1
    found = json.loads(path.read_text())
    assert [case["name"] for case in found["cases"]] == [f"{CASE}_backward"]
    assert found["failed"] == {CASE: f"Broken: {CASE}"}
    assert found["not_yet_run"] == []
    assert "begun" not in found
    assert f"- {CASE}: Broken: {CASE}" in capsys.readouterr().out


def test_a_case_in_which_the_process_ended_is_passed_over_when_it_goes_on(measured, tmp_path):
    path = tmp_path / "result.json"
    assert run.main([*ARGUMENTS, "--minutes", "0", "--output", str(path)]) == 0
    path.write_text(json.dumps(json.loads(path.read_text()) | {"begun": CASE}))
    assert run.main(["--keep-going", "--resume", str(path)]) == 1
    found = json.loads(path.read_text())
    assert found["failed"] == {CASE: "the process ended during this case"}
    assert [case["name"] for case in found["cases"]] == [f"{CASE}_backward"]


def test_a_lost_device_asks_for_another_process(measured, monkeypatch, tmp_path):
    path = tmp_path / "result.json"

    def lost(device, tried):
        if tried:
            raise measure.DeviceLost("an illegal memory access")

    with monkeypatch.context() as patch:
        patch.setattr(measure, "_require_working_device", lost)
        assert run.main([*ARGUMENTS, "--keep-going", "--output", str(path)]) == measure.STOPPED
    assert json.loads(path.read_text())["not_yet_run"] == [f"{CASE}_backward"]
    assert run.main(["--keep-going", "--resume", str(path)]) == 0
    assert json.loads(path.read_text())["not_yet_run"] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "stairs"], "suite must be one of ops, steps, memory, growth, forms, sizes, host, got 'stairs'"),
        (["--case", "spectral_norm/medium", "--device", "cpu"], "matches 'spectral_norm/medium': choose from spectral"),
        (["--case", "*/large/*", "--device", "cpu"], "no ops case for cpu matches '*/large/*'"),
        (["--device", "tpu"], "device must be auto, cpu or cuda, got 'tpu'"),
        (["--resume", "x.json", "--suite", "ops"], "--resume uses the settings of the file: leave out --suite"),
        (["--resume", "nowhere.json"], "nowhere.json"),
        (["--batch", "4"], "--input and --batch describe the model of --model MODULE:NAME, which is missing"),
        (["--suite", "memory", "--rounds", "3"], "--suite memory times only one call: leave out --rounds"),
    ],
)
def test_what_is_unknown_is_refused_in_one_line(arguments, message, capsys):
    assert cli.main(["bench", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_is_refused_where_there_is_none():
    with pytest.raises(ValueError, match="device is cuda, but PyTorch finds no CUDA device"):
        run.main(["--device", "cuda"])


def test_a_run_has_at_least_one_round(capsys):
    with pytest.raises(SystemExit):
        run.main(["--rounds", "0"])
    assert "must be at least 1, got 0" in capsys.readouterr().err


@pytest.mark.parametrize("minutes", ["-1", "nan"])
def test_minutes_are_no_less_than_none(minutes, capsys):
    with pytest.raises(SystemExit):
        run.main(["--minutes", minutes])
    assert f"must not be negative, got {minutes}" in capsys.readouterr().err


def test_compiled_steps_on_a_cpu_are_a_few_unless_a_pattern_selects_others():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    few = run.choose_cases("steps", None, cpu, compiled=True)
    assert sorted(case.name for case in few) == sorted(COMPILED_ON_A_CPU)
    for suite, pattern, device, compiled in (
        ("steps", "*", cpu, True),
        ("steps", None, cpu, False),
        ("steps", None, cuda, True),
        ("forms", None, cpu, True),
    ):
        names = [case.name for case in run.choose_cases(suite, pattern, device, compiled=compiled)]
        assert names == [name for name in SUITES[suite] if device.type in CASES[name].device_types]


def test_results_go_to_a_folder_of_the_device_and_a_file_of_the_commit(monkeypatch, tmp_path):
    cpu = torch.device("cpu")
    monkeypatch.setattr(provenance, "cpu_name", lambda: "Some(R) CPU @ 2.0GHz")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    name = f"some-r-cpu-2-0ghz-avx2-{torch.get_num_threads()}-threads"
    monkeypatch.setattr(run, "commit_of", lambda folder: ("0123456789ab", False))
    for inside in (run.ROOT, run.ROOT / "fastgan"):
        monkeypatch.chdir(inside)
        assert run.output_path(None, cpu, "ops") == run.ROOT / "benchmarks" / "results" / name / "ops-0123456789ab.json"
    monkeypatch.chdir(tmp_path)
    assert run.output_path(None, cpu, "ops") == Path("fastgan-bench") / name / "ops-0123456789ab.json"
    assert run.output_path(Path("here"), cpu, "ops") == Path("here") / name / "ops-0123456789ab.json"
    assert run.output_path(Path("here/x.json"), cpu, "ops") == Path("here/x.json")
    monkeypatch.setattr(run, "commit_of", lambda folder: (None, None))
    assert run.output_path(None, cpu, "ops") == Path("fastgan-bench") / name / "ops-unknown.json"


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
