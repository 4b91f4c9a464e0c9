"""Runs the cases of fastgan.bench with pytest-benchmark: `make bench`."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch

from fastgan.bench.case import BASELINE, BY_NAME, Run, prepare
from fastgan.bench.cases import CASES

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
TABLE = [
    (name, device_type, variant)
    for device_type in DEVICES
    for name, case in CASES.items()
    if device_type in case.device_types and case.suite in ("ops", "steps")
    for variant in (
        (BASELINE, "fastgan")
        if case.suite == "steps"
        else (BASELINE, "reference", "fastgan", *(BY_NAME if device_type == "cuda" else ()))
    )
]


@lru_cache(maxsize=1)
def prepared(name: str, device_type: str) -> tuple[dict[str, Run], dict[str, str]]:
    variants, _, left_out = prepare(CASES[name], torch.device(device_type))
    return variants, left_out


@pytest.mark.parametrize(("name", "device_type", "variant"), TABLE)
def test_speed(benchmark, name, device_type, variant):
    variants, left_out = prepared(name, device_type)
    if variant not in variants:
        pytest.skip(left_out.get(variant, "not a variant of this case"))
    run = variants[variant]

    def run_to_the_end():
        run()
        torch.cuda.synchronize()

    case = CASES[name]
    benchmark.group = f"{name} on {device_type}"
    benchmark.extra_info.update(bytes=case.bytes, operations=case.operations)
    benchmark(run_to_the_end if device_type == "cuda" else run)
