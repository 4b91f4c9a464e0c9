"""Whole processes under ``fastgan run``: the table, workers, FASTGAN=off, --compare. Each imports PyTorch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TRAIN = """
import sys, time
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
WORKERS = (
    TRAIN
    + """
def work(queue, seed):
    queue.put((seed, round(train(6, seed), 4), type(torch.autograd.grad).__name__, torch.autograd.grad.__module__))

if __name__ == "__main__":
    import multiprocessing
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    worker = context.Process(target=work, args=(queue, 1))
    worker.start()
    print(queue.get(), torch.autograd.grad.__code__.co_filename.endswith("session.py"))
    worker.join()
    print(worker.exitcode)
"""
)

CHILDREN = {
    "forkserver": """
    import multiprocessing
    worker = multiprocessing.get_context("forkserver").Process(target=train, args=(6, 1))
    worker.start()
    worker.join()
    print(worker.exitcode)
""",
    "fork": """
    import multiprocessing
    worker = multiprocessing.get_context("fork").Process(target=train, args=(6, 1))
    worker.start()
    worker.join()
    print(worker.exitcode)
""",
    "torch.multiprocessing.spawn": """
    import torch.multiprocessing
    torch.multiprocessing.spawn(work, (6,), nprocs=1)
    print(0)
""",
    "subprocess": """
    import subprocess
    print(subprocess.run([sys.executable, __file__, "6"]).returncode)
""",
}
CHILD = (
    TRAIN
    + """
def work(rank, steps):
    train(steps, rank)

if len(sys.argv) > 1:
    train(int(sys.argv[1]))
elif __name__ == "__main__":
"""
)


def run(folder, text, *command, **variables):
    (folder / "script.py").write_text(text)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables}
    environment.pop("FASTGAN_RUN", None)
    result = subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    return result.stdout, result.stderr


def test_a_script_prints_the_same_and_the_table_follows(tmp_path):
    output, errors = run(tmp_path, PLAIN, "-m", "fastgan", "run", "--always", "script.py", "6")
    expected, nothing = run(tmp_path, PLAIN, "-m", "fastgan", "run", "script.py", "6", FASTGAN="off")
    assert float(output) == pytest.approx(float(expected), rel=1e-4)
    assert nothing == ""
    (row,) = [line.split() for line in errors.splitlines() if line.startswith("  script.py:")]
    assert row[1:3] == ["Sequential", "5"]
    assert float(row[5]) < float(row[3])  # forwards' work with fastgan and with PyTorch


def test_a_spawned_worker_is_under_the_launcher_too(tmp_path):
    output, errors = run(tmp_path, WORKERS, "-m", "fastgan", "run", "--always", "script.py")
    assert "True" in output
    assert output.splitlines()[-1] == "0"
    assert "script.py:" in errors  # the table of the worker; its parent computes no penalty


@pytest.mark.parametrize("way", CHILDREN)
def test_other_children_are_under_the_launcher_too(tmp_path, way):
    output, errors = run(tmp_path, CHILD + CHILDREN[way], "-m", "fastgan", "run", "--always", "script.py")
    assert output == "0\n"
    assert "script.py:" in errors


def test_a_forked_worker_does_not_print_its_parents_table(tmp_path):
    script = CHILD + "    train(6)\n" + CHILDREN["fork"].replace("target=train, args=(6, 1)", "target=int")
    _, errors = run(tmp_path, script, "-m", "fastgan", "run", "--always", "script.py")
    assert errors.count("  script.py:") == 1


def test_two_ranks_of_torchrun_are_under_the_launcher(tmp_path):
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "fastgan", "run", "--always", "script.py"]
    output, errors = run(tmp_path, PLAIN, *command, "6")
    assert len(output.split()) == 2
    assert errors.count("  script.py:") == 2


def test_compare_prints_times_memory_and_differences(tmp_path):
    output, errors = run(tmp_path, PLAIN, "-m", "fastgan", "run", "--compare", "4", "script.py", "40")
    assert errors == ""
    first, times, memory, losses, parameters = output.splitlines()
    assert first.startswith("fastgan: 4 steps")
    assert "times as fast" in times
    assert "MiB" in memory
    for line in (losses, parameters):
        assert float(line.split("fastgan ")[1].split(";")[0]) < 1e-4
