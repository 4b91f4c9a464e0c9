"""All timed cases. `fastgan bench`, pytest-benchmark and the tests read CASES."""

from __future__ import annotations

from fastgan.bench.case import Case
from fastgan.bench.cases import (
    attention,
    bias_act,
    conv,
    conv2d_resample,
    filtered_steps,
    forms,
    gradient_penalty,
    grid_sample,
    growth,
    host,
    minibatch_discrimination,
    minibatch_stddev,
    norm,
    sizes,
    spectral_norm,
    upfirdn2d,
    whole_steps,
)

# The most important cases come first, so that an interrupted run has them.
_FILES = (
    spectral_norm,
    whole_steps,
    filtered_steps,
    gradient_penalty,
    minibatch_discrimination,
    minibatch_stddev,
    norm,
    attention,
    conv,
    bias_act,
    upfirdn2d,
    conv2d_resample,
    grid_sample,
    growth,
    forms,
    sizes,
    host,
)
CASES: dict[str, Case] = {case.name: case for file in _FILES for case in file.CASES}


def _of(*suites: str) -> tuple[str, ...]:
    return tuple(name for suite in suites for name, case in CASES.items() if case.suite == suite)


SUITES: dict[str, tuple[str, ...]] = {
    "ops": _of("ops"),
    "steps": _of("steps"),
    "memory": _of("memory", "steps"),
    "growth": _of("growth"),
    "forms": _of("forms"),
    "sizes": _of("sizes"),
    "host": _of("host"),
}

# The steps that --compile measures on a CPU, which needs a minute to compile all forms of one.
COMPILED_ON_A_CPU = (
    "d-step/wgan-gp/critic64-batch4",
    "d-step/wgan-gp/critic64-batch16",
    "d-step/wgan-gp/dcgan64-batch16",
    "d-step/wgan-gp/layernorm64-batch16",
    "d-step/r1/stylegan2-32-batch8",
)
