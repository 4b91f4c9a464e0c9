"""Run the file of a test in several processes over gloo. Each process writes its results to a file."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed as dist

from fastgan.ops.gradient_penalty.small import at_any_size

ROOT = Path(__file__).resolve().parents[2]
RANKS = 2

needs_gloo = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="needs gloo")


def found_by_ranks(file: str, folder: Path, ranks: int = RANKS) -> list[Any]:
    """Return the results that `as_rank` wrote in each process."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, file]
    each = [[*command, str(rank), str(folder), str(ranks)] for rank in range(ranks)]
    processes = [subprocess.Popen(arguments, env=environment) for arguments in each]
    try:
        assert [process.wait(300) for process in processes] == [0] * ranks
    finally:
        for process in processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt") for rank in range(ranks)]


def as_rank(work: Callable[[int], Any]) -> None:
    """Run work(rank) inside a process group and write its result."""
    rank, folder, ranks = int(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=ranks)
    with at_any_size():  # as in tests/conftest.py
        torch.save(work(rank), folder / f"{rank}.pt")
    dist.destroy_process_group()
