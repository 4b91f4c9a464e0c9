from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastgan.trainer.config import TrainConfig
from fastgan.trainer.errors import RunFolderError
from fastgan.trainer.lock import Lock
from fastgan.trainer.loop import Trainer
from fastgan.trainer.run import RunFolder

ROOT = Path(__file__).resolve().parents[2]
HOLD = """
import sys
from pathlib import Path
from fastgan.trainer.lock import Lock
Lock(Path(sys.argv[1])).take()
print("taken", flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def bare(monkeypatch):
    monkeypatch.setattr(Trainer, "_summarize", lambda trainer: None)
    monkeypatch.setattr(Trainer, "_draw", lambda trainer: None)


@pytest.fixture
def other(ring8_config):
    """Another process that has the lock of the run."""
    ring8_config.folder.mkdir(parents=True)
    command = [sys.executable, "-c", HOLD, str(ring8_config.folder / "lock")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, env=environment, text=True, **pipes) as process:
        assert process.stdout.readline() == "taken\n"
        yield process
        process.kill()


def test_a_second_process_is_refused_and_told_which_one_has_the_run(ring8_config, other):
    message = rf"ring8 is in use by process {other.pid} on {socket.gethostname()}: wait for it, or stop it first"
    with pytest.raises(RunFolderError, match=message):
        Trainer(ring8_config)
    with pytest.raises(RunFolderError, match=message):
        Lock(ring8_config.folder / "lock").take()
    assert sorted(path.name for path in ring8_config.folder.iterdir()) == ["lock"]


def test_the_lock_of_a_killed_process_is_taken_over(ring8_config, other):
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert json.loads((ring8_config.folder / "lock").read_text())["pid"] == other.pid
    assert Trainer(ring8_config).train() is None
    assert not (ring8_config.folder / "lock").exists()


def test_a_running_trainer_has_the_lock_and_gives_it_back(ring8_config):
    trainer = Trainer(ring8_config)
    assert json.loads((ring8_config.folder / "lock").read_text()) == {"pid": os.getpid(), "host": socket.gethostname()}
    if hasattr(os, "fork"):
        child = multiprocessing.get_context("fork").Process(target=try_to_resume, args=(ring8_config,))
        child.start()
        child.join()
        assert child.exitcode == 7
    trainer.train()
    assert not (ring8_config.folder / "lock").exists()


def try_to_resume(config: TrainConfig) -> None:
    try:
        Trainer(dataclasses.replace(config, resume=True))
    except RunFolderError:
        os._exit(7)


def test_a_file_that_was_removed_in_between_is_no_lock(tmp_path, monkeypatch):
    lock = Lock(tmp_path / "lock")
    current = iter([False, True])
    monkeypatch.setattr(Lock, "_is_current", lambda *_: next(current))
    lock.take()
    assert lock.descriptor is not None
    lock.release()
    assert not list(tmp_path.iterdir())


def test_what_a_killed_process_was_writing_is_in_nobodys_way(ring8_config):
    folder = ring8_config.folder
    folder.mkdir(parents=True)
    (folder / "config.json.partial").write_text("{")
    Trainer(ring8_config).train()
    partials = folder / "data.json.partial", folder / "checkpoints" / "step-00000003.partial"
    for partial in partials:
        partial.touch()
    Trainer(dataclasses.replace(ring8_config, resume=True, steps=6)).train()
    assert not list(folder.rglob("*.partial"))


@pytest.mark.usefixtures("other")
def test_a_process_that_comes_second_while_both_start_leaves_the_files_of_the_first(ring8_config, monkeypatch):
    monkeypatch.setattr(Lock, "check", lambda lock: None)  # the first one takes the lock after this
    run = RunFolder(ring8_config)
    first = ring8_config.folder / "config.json"
    first.write_text("of the first")
    with pytest.raises(RunFolderError, match="is in use by process"):
        run.open(ring8_config)
    run.undo()
    assert first.read_text() == "of the first"


def test_a_run_that_ended_while_another_one_started_is_kept(ring8_config):
    run = RunFolder(ring8_config)
    Trainer(ring8_config).train()
    before = {path: path.read_bytes() for path in ring8_config.folder.rglob("*") if path.is_file()}
    with pytest.raises(RunFolderError, match="ring8 already exists"):
        run.open(ring8_config)
    run.undo()
    assert {path: path.read_bytes() for path in ring8_config.folder.rglob("*") if path.is_file()} == before


def test_a_resumed_run_that_is_refused_leaves_the_metrics(ring8_config, monkeypatch):
    Trainer(dataclasses.replace(ring8_config, log_every=1)).train()
    with open(ring8_config.folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 99}\n')  # by the process that has the lock

    def refuse(lock: Lock) -> None:
        raise RunFolderError("in use")

    monkeypatch.setattr(Lock, "take", refuse)
    with pytest.raises(RunFolderError, match="in use"):
        Trainer(dataclasses.replace(ring8_config, resume=True))
    assert (ring8_config.folder / "metrics.jsonl").read_text().endswith('{"step": 99}\n')


def test_a_file_in_the_place_of_the_folder_is_named(ring8_config):
    ring8_config.runs.write_text("")
    with pytest.raises(RunFolderError, match="ring8 cannot be written to: Not a directory"):
        Trainer(ring8_config)


def test_a_folder_with_other_files_is_not_called_a_run(ring8_config):
    ring8_config.folder.mkdir(parents=True)
    (ring8_config.folder / "notes.txt").touch()
    with pytest.raises(RunFolderError, match="ring8 has files but no run: choose another --name, or --overwrite"):
        Trainer(ring8_config)


@pytest.mark.parametrize("where", ["header", "first step"])
def test_a_start_that_fails_leaves_nothing(ring8_config, monkeypatch, where):
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("out of memory")

    if where == "header":
        monkeypatch.setattr("fastgan.trainer.report.page.header", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            Trainer(ring8_config)
    else:
        trainer = Trainer(ring8_config)
        monkeypatch.setattr(trainer.gan, "step", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            trainer.train()
    assert not ring8_config.runs.exists()


def test_a_resumed_start_that_fails_keeps_the_run(ring8_config, monkeypatch):
    Trainer(ring8_config).train()
    before = sorted(ring8_config.folder.rglob("*"))

    def fail(*_: object, **__: object) -> torch.Tensor:
        raise RuntimeError("out of memory")

    trainer = Trainer(dataclasses.replace(ring8_config, resume=True, steps=9))
    monkeypatch.setattr(trainer.gan, "step", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.train()
    assert sorted(ring8_config.folder.rglob("*")) == before
