"""Run the file of a test in several processes over gloo. Each process writes its results to a file.

A server imports PyTorch and fastgan once per pytest process. The ranks are forks of it and start at once.
"""

from __future__ import annotations

import atexit
import json
import os
import runpy
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed as dist

from fastgan.ops.gradient_penalty.small import at_any_size

ROOT = Path(__file__).resolve().parents[2]
RANKS = 2
SECONDS = 300  # that a test may take

needs_gloo = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available() and hasattr(os, "fork")), reason="needs gloo and fork"
)


def found_by_ranks(file: str, folder: Path, ranks: int = RANKS) -> list[Any]:
    """Return the results that `as_rank` wrote in each process."""
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    server.stdin.write(json.dumps([file, str(folder), ranks]) + "\n")
    server.stdin.flush()
    assert json.loads(server.stdout.readline()) == [0] * ranks
    return [torch.load(folder / f"{rank}.pt") for rank in range(ranks)]


def as_rank(work: Callable[[int], Any]) -> None:
    """Run work(rank) inside a process group and write its result."""
    rank, folder, ranks = int(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=ranks)
    with at_any_size():  # as in tests/conftest.py
        torch.save(work(rank), folder / f"{rank}.pt")
    dist.destroy_process_group()


@cache
def _server() -> subprocess.Popen[str]:
    one_thread = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "MKL", "OPENBLAS")}  # others would not survive
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.distributed.processes"],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | one_thread,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    atexit.register(server.kill)
    return server


def _serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what tests print is no answer
    for line in sys.stdin:
        file, folder, ranks = json.loads(line)
        children = [_fork(file, [str(rank), folder, str(ranks)]) for rank in range(ranks)]
        print(json.dumps(_exits(children)), file=answers, flush=True)


def _fork(file: str, arguments: list[str]) -> int:
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        sys.argv = [file, *arguments]
        runpy.run_path(file, run_name="__main__")
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def _exits(children: list[int]) -> list[int]:
    """Wait for the ranks. If one fails, or time is up, end the others, which may wait for it."""
    exits, last = dict.fromkeys(children, -signal.SIGKILL), time.monotonic() + SECONDS
    running = set(children)
    while running:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child:
            running.remove(child)
            exits[child] = os.waitstatus_to_exitcode(status)
        failed = any(exits[each] for each in set(children) - running)
        if running and (failed or time.monotonic() > last):
            for each in running:
                os.kill(each, signal.SIGKILL)
                os.waitpid(each, 0)
            break
        time.sleep(0.02)
    return list(exits.values())


if __name__ == "__main__":
    _serve()
