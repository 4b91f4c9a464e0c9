from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from fastgan.bench import measure, run, timing


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """Use one thread. On shared cores, two threads mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="package")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real run through the command line, small and short. The machine's ceilings are measured in less time."""
    path = tmp_path_factory.mktemp("bench") / "folder" / "result.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "copy_bandwidth", partial(timing.copy_bandwidth, size=2**22))
        patch.setattr(timing, "matmul_rate", partial(timing.matmul_rate, side=256))
        patch.setitem(measure.SAMPLE_SECONDS, "cpu", 1e-3)
        arguments = ["--case", "*/small/*", "--device", "cpu", "--rounds", "2", "--output", str(path), "--report"]
        assert run.main(arguments) == 0
    return path
