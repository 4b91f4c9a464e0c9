"""The programs on the simulated device for a few steps: train, verify, bench."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastgan import cli
from fastgan.trainer.verify.verify import VerifyConfig, verify


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@contextlib.contextmanager
def default_device(name):
    before = torch.get_default_device()
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(before)


def train(*options):
    arguments = ["train", "ring8", "--device", "cuda", "--steps", "2", "--name", "run", "--overwrite", *options]
    assert not cli.main(arguments)


def test_the_trainer_takes_steps_and_goes_on_from_them(folder):
    train()
    assert not cli.main(["train", "ring8", "--name", "run", "--resume", "--steps", "3"])
    assert (folder / "runs" / "run" / "report.html").exists()


def test_the_trainer_does_not_ask_what_the_default_device_is(folder):
    with default_device("cuda"):
        train("--penalty", "r1")


def test_a_run_on_the_cpu_allocates_nothing_on_the_gpu(folder):
    code = (
        "import torch; from fastgan import cli; "
        "assert not cli.main(['train', 'ring8', '--device', 'cpu', '--steps', '2']); "
        "assert torch.cuda.is_available(); assert torch.cuda.max_memory_allocated() == 0"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_the_fused_model_keeps_in_step(folder):
    assert verify(VerifyConfig(dataset="ring8", steps=2, timed_steps=1, device="cuda", out=folder / "verify"))
    assert json.loads(Path(folder / "verify" / "verify.json").read_text())["passed"] is True


def test_a_case_is_measured_if_the_hosts_times_will_do(folder):
    """In a process of its own: the rehearsal changes the module that measures."""
    script = Path(__file__).with_name("rehearse_bench.py")
    case = "norm/instance_norm/r1"
    command = [sys.executable, script, "--device", "cuda", "--rounds", "1", "--case", case, "--output", "ops.json"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    found = json.loads((folder / "ops.json").read_text())
    assert "Simulated" in found["provenance"]["device"]
    assert [measured["name"] for measured in found["cases"]] == [case]
