"""Whole processes under ``fastgan run``: the table, workers, FASTGAN=off, --compare. Each imports PyTorch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fastgan.launcher.command import main

ROOT = Path(__file__).resolve().parents[2]
TRAIN = """
import importlib.util, os, subprocess, sys
assert importlib.util.find_spec("torch") is not None  # as transformers does
import fastgan
import torch
from torch import nn

def train(steps, seed=0):
    torch.manual_seed(seed)
    d = nn.Sequential(nn.Conv2d(3, 8, 3), nn.LeakyReLU(0.2), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 1))
    optimizer = torch.optim.SGD(d.parameters(), 1e-3)
    for _ in range(steps):
        x = torch.randn(4, 3, 8, 8, requires_grad=True)
        (grad,) = torch.autograd.grad(d(x).sum(), x, create_graph=True)
        loss = grad.square().sum() + d(x.detach()).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()
"""
PLAIN = TRAIN + "print(train(int(sys.argv[1])))\n"
# Each process takes another number of steps, by which its table is known. A forked worker that trains nothing inherits
# the table of the parent.
FAMILY = (
    TRAIN
    + """
def work(steps):
    train(steps, steps)
    sys.exit(steps)

def rank(number, steps):
    train(steps)

if len(sys.argv) > 1:
    print("alone", train(int(sys.argv[1])))
elif __name__ == "__main__":
    import torch.multiprocessing as mp
    print("parent", train(6), flush=True)
    for way, target, steps in (("fork", int, 0), ("fork", work, 8), ("forkserver", work, 8)):
        worker = mp.get_context(way).Process(target=target, args=(steps,))
        worker.start()
        worker.join()
        print(way, worker.exitcode, flush=True)
    mp.spawn(rank, (9,), nprocs=1)
    for variables in ({}, {"FASTGAN": "off"}):
        steps = "6" if variables else "10"
        subprocess.run([sys.executable, __file__, steps], env={**os.environ, **variables}, check=True)
"""
)


def run(folder, text, *command):
    (folder / "script.py").write_text(text)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment.pop("FASTGAN_RUN", None)
    result = subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    return result.stdout, result.stderr


@pytest.mark.long
def test_a_script_and_its_children_print_the_same_and_each_has_its_table(tmp_path):
    output, errors = run(tmp_path, FAMILY, "-m", "fastgan", "run", "--always", "script.py")
    parent, nothing, fork, forkserver, _, off = output.splitlines()
    assert (nothing, fork, forkserver) == ("fork 0", "fork 8", "forkserver 8")
    assert float(parent.split()[1]) == pytest.approx(float(off.split()[1]), rel=1e-4)
    rows = [line.split() for line in errors.splitlines() if line.startswith("  script.py:")]
    # The first step shows the penalty; in a forked worker, it turns the hooks on again. FASTGAN=off has no table.
    assert sorted(row[1:3] for row in rows) == [["Sequential", str(steps)] for steps in (5, 6, 7, 8, 9)]
    for row in rows:
        assert float(row[5]) < float(row[3])  # forwards' work with fastgan and with PyTorch


WITHOUT = "for x in [torch.ones(1, requires_grad=True)]:\n    (3 * x).backward()\n"
OWN = "fastgan.gradient_penalty(nn.Sequential(nn.Linear(3, 1)), torch.randn(2, 3), kind='r1').backward()\n"
CHILD = "sys.argv[1:] or subprocess.run([sys.executable, __file__, '1'], check=True)\n"


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        (WITHOUT, ["fastgan: no gradient penalty was found in this run"]),
        (WITHOUT + CHILD, ["fastgan: no gradient penalty was found in this run"]),
        (WITHOUT + "train(1)\n", []),
        (WITHOUT + OWN, []),
        ("", []),  # perhaps the help text of the script
    ],
    ids=["none", "none in a child either", "too short to be rerouted", "fastgan's own", "no training"],
)
def test_a_script_that_trains_without_a_penalty_says_so_once(tmp_path, text, lines):
    _, errors = run(tmp_path, TRAIN + text, "-m", "fastgan", "run", "script.py")
    assert errors.splitlines() == lines


def test_two_ranks_of_torchrun_are_under_the_launcher(tmp_path):
    command = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "fastgan",
        "run",
        "--always",
        "script.py",
    ]
    output, errors = run(tmp_path, PLAIN, *command, "6")
    assert len(output.split()) == 2
    assert errors.count("  script.py:") == 2


@pytest.mark.long
def test_compare_prints_times_memory_and_differences(tmp_path, monkeypatch, capsys):
    (tmp_path / "script.py").write_text(PLAIN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert main(["--compare", "4", "script.py", "40"]) == 0
    output, errors = capsys.readouterr()
    assert errors == ""
    first, times, memory, losses, parameters = output.splitlines()
    assert first.startswith("fastgan: 4 steps")
    assert "times as fast" in times
    assert "MiB" in memory
    for line in (losses, parameters):
        assert float(line.split("fastgan ")[1].split(";")[0]) < 1e-4


OF_A_RANK = """
import torch
from torch import distributed, nn
distributed.init_process_group("gloo")
d = nn.Sequential(nn.Conv2d(3, 8, 3), nn.LeakyReLU(0.2), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 1))
d = nn.parallel.DistributedDataParallel(d)
optimizer = torch.optim.SGD(d.parameters(), 1e-3)
while True:
    x = torch.randn(4, 3, 8, 8, requires_grad=True)
    (grad,) = torch.autograd.grad(d(x).sum(), x, create_graph=True)
    optimizer.zero_grad()
    (grad.square().sum() + d(x.detach()).mean()).backward()
    optimizer.step()
"""


@pytest.mark.long
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
def test_ranks_are_compared_and_the_first_one_prints(tmp_path):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    output, _ = run(tmp_path, OF_A_RANK, *torchrun, "-m", "fastgan", "run", "--compare", "3", "script.py")
    assert output.count("fastgan: 3 steps") == 1
    assert "largest difference of parameters" in output


@pytest.mark.long
def test_a_comparison_that_is_terminated_leaves_no_process(tmp_path):
    (tmp_path / "script.py").write_text(
        "import os, time\nprint(os.getpid(), file=open('pid', 'w'), flush=True)\ntime.sleep(99)"
    )
    command = [sys.executable, "-m", "fastgan", "run", "--compare", "3", "script.py"]
    comparison = subprocess.Popen(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)})
    pid = tmp_path / "pid"
    while not (pid.exists() and pid.read_text()):
        assert comparison.poll() is None
        time.sleep(0.1)
    comparison.terminate()
    assert comparison.wait(20) == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)
