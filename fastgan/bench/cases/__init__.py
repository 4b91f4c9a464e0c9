"""The cases that are timed, declared once: `fastgan bench`, pytest-benchmark and the tests read CASES."""

from __future__ import annotations

from fastgan.bench.case import Case
from fastgan.bench.cases import (
    bias_act,
    gradient_penalty,
    minibatch_discrimination,
    minibatch_stddev,
    norm,
    spectral_norm,
)

# What matters most first: a run that is cut short keeps what it has.
_FILES = (spectral_norm, gradient_penalty, minibatch_discrimination, minibatch_stddev, norm, bias_act)
CASES: dict[str, Case] = {case.name: case for file in _FILES for case in file.CASES}
SUITES: dict[str, tuple[str, ...]] = {
    "ops": tuple(name for name, case in CASES.items() if not case.counted),
    "steps": tuple(name for name, case in CASES.items() if case.counted),
}
