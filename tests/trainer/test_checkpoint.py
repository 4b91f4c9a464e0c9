from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from fastgan.trainer import checkpoint
from fastgan.trainer.errors import CheckpointError


def test_a_checkpoint_loads_with_its_step_and_global_random_state(tmp_path):
    path = checkpoint.save(tmp_path, 3, {"weights": torch.arange(4.0)})
    wanted = torch.rand(5)
    torch.manual_seed(99)
    state = checkpoint.load(path)
    assert state["step"] == 3
    assert torch.equal(state["weights"], torch.arange(4.0))
    assert torch.equal(torch.rand(5), wanted)


@pytest.mark.parametrize("moment", ["torch.save", "os.fsync", "os.replace"])
def test_a_crash_at_any_moment_of_a_write_leaves_the_last_good_checkpoint(tmp_path, monkeypatch, moment):
    good = checkpoint.save(tmp_path, 1, {"value": torch.tensor(1)})

    def crash(*arguments: object) -> None:
        if moment == "torch.save":
            arguments[1].write(b"half a checkpoint")  # type: ignore[attr-defined]
        raise KeyboardInterrupt

    monkeypatch.setattr(moment, crash)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(tmp_path, 2, {"value": torch.tensor(2)})
    monkeypatch.undo()
    state, damaged = checkpoint.load_newest(tmp_path)
    assert (state["step"], int(state["value"]), damaged) == (1, 1, [])
    assert checkpoint.load(good)["value"] == 1


def test_the_file_is_flushed_to_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        calls.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def renamed(source: Path, target: Path) -> None:
        calls.append("rename")
        replace(source, target)

    monkeypatch.setattr("os.fsync", synced)
    monkeypatch.setattr("os.replace", renamed)
    checkpoint.save(tmp_path, 1, {})
    assert calls == ["step-00000001.partial", "rename", tmp_path.name]


def test_the_two_newest_checkpoints_are_kept(tmp_path):
    for step in (5, 10, 15, 100):
        checkpoint.save(tmp_path, step, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000015.pt", "step-00000100.pt"]
    assert checkpoint.load_newest(tmp_path)[0]["step"] == 100


def test_a_truncated_checkpoint_is_named(tmp_path):
    path = checkpoint.save(tmp_path, 1, {"value": torch.zeros(1000)})
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(CheckpointError, match=r"step-00000001\.pt is damaged"):
        checkpoint.load(path)


def test_a_changed_byte_is_found_by_its_checksum(tmp_path):
    path = checkpoint.save(tmp_path, 1, {"value": torch.zeros(1000)})
    content = bytearray(path.read_bytes())
    content[content.index(bytes(4000)) + 2000] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"step-00000001\.pt is damaged \(checksum\)"):
        checkpoint.load(path)


def test_an_empty_checkpoint_is_named(tmp_path):
    path = tmp_path / "step-00000001.pt"
    path.touch()
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoint.load(path)


def test_loading_runs_no_code(tmp_path):
    class Payload:
        def __reduce__(self):  # type: ignore[no-untyped-def]
            return os.mkdir, (str(tmp_path / "ran"),)

    path = tmp_path / "step-00000001.pt"
    torch.save({"step": 1, "rng": Payload()}, path)
    with pytest.raises(CheckpointError):
        checkpoint.load(path)
    assert not (tmp_path / "ran").exists()


def test_nothing_to_resume_from_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint"):
        checkpoint.load_newest(tmp_path)


def test_checkpoints_of_every_nth_step_stay(tmp_path):
    for step in range(2, 15, 2):
        checkpoint.save(tmp_path, step, {}, keep_every=4)
    kept = [4, 8, 12, 14]
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-{step:08d}.pt" for step in kept]


def test_a_missing_checkpoint_is_one_line(tmp_path):
    with pytest.raises(CheckpointError, match=r"step-1\.pt cannot be read: No such file or directory"):
        checkpoint.load(tmp_path / "step-1.pt")
