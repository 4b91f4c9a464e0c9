"""The cases that are timed, declared once: `fastgan bench`, pytest-benchmark and the tests read CASES."""

from __future__ import annotations

from fastgan.bench.case import Case
from fastgan.bench.cases import minibatch_discrimination, spectral_norm

_FILES = (minibatch_discrimination, spectral_norm)
CASES: dict[str, Case] = {case.name: case for file in _FILES for case in file.CASES}
SUITES: dict[str, tuple[str, ...]] = {"ops": tuple(CASES)}
