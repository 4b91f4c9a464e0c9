"""``fastgan bench`` on the simulated device, with the host's times and quickly measured ceilings of the machine.

Its numbers mean nothing. It shows that every case is prepared, checked, captured and recorded. Whole steps run on
PyTorch's operations, because Triton's interpreter would take hours.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from fastgan import backends
from fastgan.bench import measure, run, timing
from fastgan.bench.cases import CASES, norm

CASE, SHAPE = "instance_norm", (1, 2, 2, 2)  # one case becomes so small, because an interpreter runs its kernels


def main(arguments: Sequence[str]) -> int:
    """`run.main`, with samples as short as they get."""
    os.environ["SIMULATED_GPU_HOST_TIMES"] = "1"
    timing.copy_bandwidth = partial(timing.copy_bandwidth, size=2**20)
    timing.matmul_rate = partial(timing.matmul_rate, side=64)
    measure.SAMPLE_SECONDS["cuda"] = 1e-6
    measure.LONGEST *= 20  # as much slower as tools/gpu.sh takes this device to be
    name = f"norm/{CASE}/r1"
    CASES[name] = replace(CASES[name], setup=partial(norm.r1, CASE, shape=SHAPE))
    if "steps" in arguments:
        backends._MISSING["triton"] = lambda device_type: "it is switched off for the rehearsal"
    return run.main([*arguments])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
