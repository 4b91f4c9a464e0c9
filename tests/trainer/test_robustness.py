"""Runs survive kill -9 at any time, damaged checkpoints, full disks and unreadable folders."""

from __future__ import annotations

import dataclasses
import errno
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable

import pytest
import torch

from fastgan import strict_json
from fastgan.trainer import checkpoint
from fastgan.trainer.config import PRESETS, TrainConfig
from fastgan.trainer.data.options import PictureConfig
from fastgan.trainer.errors import CheckpointError, RunFolderError
from fastgan.trainer.export import read_export
from fastgan.trainer.loop import Trainer
from fastgan.trainer.run import replace_text
from tests.trainer.use.conftest import write_pictures

KILLS, SEEDS = (20, (0, 1)) if os.environ.get("FASTGAN_TESTS") == "all" else (2, (0,))  # kills of each run


@pytest.fixture(autouse=True)
def bare(monkeypatch):
    leave_out_the_end(monkeypatch.setattr)


def leave_out_the_end(replace: Callable[[type, str, object], None] = setattr) -> None:
    """Run the loop without the pictures and scores of its end."""
    replace(Trainer, "_summarize", lambda trainer: None)
    replace(Trainer, "_draw", lambda trainer: None)


@pytest.fixture
def child():
    """Run a function in another process, and return its exit code.

    It is not a fork, because a fork cannot use a GPU that its parent has used.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fastgan.trainer.loop"])

    def run(target: Callable[..., None], *arguments: object) -> int | None:
        process = context.Process(target=target, args=arguments)
        process.start()
        process.join()
        return process.exitcode

    return run


@pytest.fixture
def toy(ring8_config) -> TrainConfig:
    optim = dataclasses.replace(ring8_config.optim, batch_size=8)
    return dataclasses.replace(
        ring8_config, steps=12, checkpoint_every=3, log_every=2, equilibrium_every=None, optim=optim
    )


def train(config: TrainConfig, **changes: object) -> Trainer:
    trainer = Trainer(dataclasses.replace(config, **changes))
    trainer.train()
    return trainer


def go_on(config: TrainConfig) -> Trainer:
    """Resume the run as a user would after a crash."""
    started = (config.folder / "config.json").exists()
    return train(config, resume=started, overwrite=not started)


def killed_at(config: TrainConfig, call: int) -> None:
    """Continue the run, and send SIGKILL to this process at the `call`-th function call in Python or C."""
    calls = 0

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), signal.SIGKILL)

    leave_out_the_end()
    sys.setprofile(count)
    go_on(config)


def calls_of(config: TrainConfig) -> int:
    calls = 0

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal calls
        calls += 1

    sys.setprofile(count)
    try:
        train(config)
    finally:
        sys.setprofile(None)
    return calls


def bits(config: TrainConfig) -> list[torch.Tensor]:
    state, damaged = checkpoint.load_newest(config.folder / "checkpoints")
    assert damaged == []
    assert state["step"] == config.steps
    return [*flat(state["gan"]), torch.get_rng_state()]


def flat(state: object) -> list[torch.Tensor]:
    if isinstance(state, dict):
        return [tensor for key in sorted(state, key=str) for tensor in flat(state[key])]
    if isinstance(state, list | tuple):
        return [tensor for item in state for tensor in flat(item)]
    return [torch.as_tensor(state)] if isinstance(state, torch.Tensor | int | float) else []


def kill_again_and_again(config: TrainConfig, calls: int, child: Callable[..., int | None], seed: int) -> None:
    """Start the run, kill it and continue it. A run that ends before its kill is checked and started anew."""
    draw, killed = random.Random(seed), 0
    while killed < KILLS:
        code = child(killed_at, config, draw.randrange(1, calls))
        assert code in (-signal.SIGKILL, 0)
        killed += code == -signal.SIGKILL
        if code == 0:
            assert checkpoint.load_newest(config.folder / "checkpoints")[0]["step"] == config.steps
            shutil.rmtree(config.folder)
    torch.manual_seed(999)
    go_on(config)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("seed", SEEDS)
def test_a_run_that_is_killed_again_and_again_reaches_the_same_bits(toy, child, seed):
    whole, parts = (dataclasses.replace(toy, name=name, steps=3 * KILLS) for name in ("whole", "parts"))
    calls = calls_of(whole)
    wanted = bits(whole)
    kill_again_and_again(parts, calls, child, seed)
    got = bits(parts)
    assert len(got) == len(wanted) > 50
    assert all(map(torch.equal, got, wanted))
    assert recorded(parts) == recorded(whole)
    assert sorted(path.name for path in parts.folder.iterdir()) == sorted(path.name for path in whole.folder.iterdir())


def recorded(config: TrainConfig) -> list[tuple[int, float, float]]:
    records = Trainer(dataclasses.replace(config, resume=True)).run.read_metrics()
    return [(record["step"], record["d_loss"], record["diversity"]) for record in records if "d_loss" in record]


@pytest.mark.parametrize("damage", ["cut short", "emptied", "overwritten", "one byte"])
def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before_it(toy, capsys, damage):
    whole = train(toy, name="whole")
    train(toy, steps=6)
    path = toy.folder / "checkpoints" / "step-00000006.pt"
    content = path.read_bytes()
    half = len(content) // 2
    changed = content[:half] + bytes([content[half] ^ 1]) + content[half + 1 :]
    damaged = {"cut short": content[:half], "emptied": b"", "overwritten": b"x" * 999, "one byte": changed}
    path.write_bytes(damaged[damage])
    resumed = train(toy, resume=True)
    assert "step-00000006.pt is damaged" in capsys.readouterr().out
    assert all(map(torch.equal, flat(resumed.gan.state_dict()), flat(whole.gan.state_dict())))


def test_a_damaged_line_of_the_metrics_is_named_and_a_last_one_that_was_cut_short_is_dropped(toy):
    whole = train(toy, steps=6).run
    text = whole.metrics.read_text()
    whole.metrics.write_text(text + '{"step": 6, "d_lo')
    assert whole.read_metrics() == [strict_json.loads(line) for line in text.splitlines()]
    train(toy, steps=8, resume=True)
    lines = whole.metrics.read_text().splitlines(keepends=True)
    assert json.loads(lines[-1])["step"] == 8
    for damaged in ("garbage\n", "\0\n", "3\n", "\n", "\udcff\n"):
        content = "".join([*lines[:2], damaged, *lines[2:]])
        whole.metrics.write_bytes(content.encode(errors="surrogateescape"))
        with pytest.raises(RunFolderError, match=r"metrics\.jsonl, line 3 is no record in JSON"):
            Trainer(dataclasses.replace(toy, resume=True))
        assert whole.metrics.read_bytes() == content.encode(errors="surrogateescape")


def test_all_checkpoints_damaged_is_an_error_that_names_them(toy):
    train(toy, steps=6)
    for path in (toy.folder / "checkpoints").iterdir():
        path.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"step-00000006\.pt is damaged .*; .*step-00000003\.pt is damaged"):
        Trainer(dataclasses.replace(toy, resume=True))


class FullDisk:
    """A file on a disk with room for `room` bytes."""

    def __init__(self, file, room: int) -> None:
        self.file, self.room = file, room

    def write(self, data) -> int:
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.file.write(data)

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()


@pytest.mark.parametrize("room", [0, 1000, 20_000])
def test_a_full_disk_loses_nothing_and_says_how_to_go_on(toy, monkeypatch, room):
    trainer = train(toy, steps=6)
    before = sorted((path.name, path.read_bytes()) for path in trainer.run.checkpoints.iterdir())
    monkeypatch.setattr("builtins.open", lambda *args, open=open, **options: FullDisk(open(*args, **options), room))
    with pytest.raises(CheckpointError, match=r"No space left on device\); step-00000006\.pt is intact.*--resume"):
        checkpoint.save(trainer.run.checkpoints, 7, {"gan": trainer.gan.state_dict()})
    monkeypatch.undo()
    assert sorted((path.name, path.read_bytes()) for path in trainer.run.checkpoints.iterdir()) == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_write_past_the_systems_limit_leaves_the_last_checkpoint(toy, child):
    train(toy, steps=6)
    assert child(resume_with_small_files, toy) == 3
    assert checkpoint.load_newest(toy.folder / "checkpoints")[0]["step"] == 6


def resume_with_small_files(config: TrainConfig) -> None:
    import resource

    leave_out_the_end()
    trainer = Trainer(dataclasses.replace(config, resume=True))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write fails, instead of killing
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
    try:
        trainer.train()
    except (CheckpointError, OSError):
        os._exit(3)


def test_a_failed_rewrite_leaves_the_old_text(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    replace_text(path, "old")
    monkeypatch.setattr("builtins.open", lambda *args, open=open, **options: FullDisk(open(*args, **options), 2))
    with pytest.raises(OSError, match="No space left"):
        replace_text(path, "newer")
    monkeypatch.undo()
    assert path.read_text() == "old"
    assert [found.name for found in tmp_path.iterdir()] == ["config.json"]


def test_an_export_that_cannot_be_written_leaves_no_partial_file(toy, tmp_path):
    pytest.importorskip("safetensors", reason="needs fastgan[export]")
    from fastgan.trainer.export import ExportConfig, export

    train(toy)
    out = tmp_path / "taken"
    out.mkdir()
    with pytest.raises(OSError, match="directory"):
        export(ExportConfig(toy.folder, out))
    assert not list(tmp_path.glob("*.partial"))


def test_an_unreadable_run_folder_is_named(toy, monkeypatch):
    def refuse(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    toy.folder.mkdir(parents=True)
    monkeypatch.setattr("pathlib.Path.iterdir", refuse)  # root may read everything
    with pytest.raises(RunFolderError, match=r"ring8 cannot be read: Permission denied"):
        Trainer(toy)


def test_a_run_folder_that_cannot_be_written_is_named_before_the_first_step(toy, monkeypatch):
    def refuse(dir: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(dir))

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)  # root may write everywhere
    with pytest.raises(RunFolderError, match=r"ring8 cannot be written to: Permission denied"):
        Trainer(toy)


def test_export_writes_the_averaged_generator(toy):
    pytest.importorskip("safetensors", reason="needs fastgan[export]")
    from safetensors import safe_open

    from fastgan.trainer.export import ExportConfig, export

    trainer = train(toy)
    with safe_open(export(ExportConfig(toy.folder)), "pt") as file:
        weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        assert file.metadata()["step"] == "12"
    wanted = trainer.gan.ema.module.state_dict()
    assert weights.keys() == wanted.keys()
    assert all(torch.equal(weights[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize("conditional", [False, True])
def test_an_exported_generator_is_built_again_by_the_line_that_export_prints(config, monkeypatch, capsys, conditional):
    pytest.importorskip("safetensors", reason="needs fastgan[export]")
    from fastgan import cli

    model = dataclasses.replace(config.model, conditional=conditional)
    trainer = train(
        config, dataset="waveforms", data=None, model=model, optim=dataclasses.replace(config.optim, batch_size=4)
    )
    assert cli.main(["export", str(config.folder)]) == 0
    imports, _, line = capsys.readouterr().out.splitlines()[-1].partition(": ")[2].rpartition("; ")
    scope: dict[str, object] = {}
    exec(imports, scope)
    torch.manual_seed(0)
    z = torch.randn(16, 8)
    draw = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *sizes: z if sizes == (16, 8) else draw(*sizes))
    samples = eval(line, scope)
    assert torch.equal(samples, trainer.gan.samples(z))
    assert not samples.requires_grad


def test_a_checkpoint_that_does_not_know_its_data_is_refused_with_the_remedy(toy):
    pytest.importorskip("safetensors", reason="needs fastgan[export]")
    from fastgan.trainer.export import ExportConfig, export

    train(toy)
    path = toy.folder / "checkpoints" / "step-00000012.pt"
    state = torch.load(path, weights_only=True)
    del state["data"]
    torch.save(state, path)
    with pytest.raises(CheckpointError, match="rewrite it with fastgan train --resume"):
        export(ExportConfig(toy.folder))
    train(toy, resume=True)
    export(ExportConfig(toy.folder))


@pytest.mark.long
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("seed", SEEDS)
def test_a_run_on_pictures_that_is_killed_again_and_again_reaches_the_same_bits(tmp_path, child, seed):
    """With random crops, mirrors, ADA, scores while training, frozen layers, a lock and a record of the data."""
    pytest.importorskip("safetensors", reason="needs fastgan[export]")
    preset = PRESETS["folder"][1]
    config = dataclasses.replace(
        preset,
        runs=tmp_path / "runs",
        data=write_pictures(tmp_path / "pictures", 120),
        image_size="8x16",
        device="cpu",
        steps=max(6, KILLS),
        log_every=1,
        checkpoint_every=2,
        score_every=2,
        equilibrium_every=None,
        pictures=PictureConfig(crop="random", channels=4, mirror=True),
        model=dataclasses.replace(preset.model, width=4, latent_dim=8, conditional=True),
        optim=dataclasses.replace(preset.optim, batch_size=8, augment="ada", freeze_d=1),
    )
    whole, parts = (dataclasses.replace(config, name=name) for name in ("whole", "parts"))
    calls = calls_of(whole)
    kill_again_and_again(parts, calls, child, seed)
    wanted, got = bits(whole), bits(parts)
    assert len(got) == len(wanted) > 50
    assert all(map(torch.equal, got, wanted))
    assert read_export(parts.folder / "best.safetensors")[2] == read_export(whole.folder / "best.safetensors")[2]
    costs = [
        [r["cost"] for r in Trainer(dataclasses.replace(c, resume=True)).run.read_metrics() if "cost" in r]
        for c in (whole, parts)
    ]
    assert costs[0] == costs[1]
    assert len(costs[0]) == config.steps // 2
