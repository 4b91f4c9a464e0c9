"""Learning rates over a run: a linear rise at its start, and a linear fall to zero."""

from __future__ import annotations


def rate_factor(step: int, warmup: int | None, decay: tuple[int, int] | None) -> float:
    """Return the factor of the learning rates after `step` steps.

    It is (step + 1) / warmup during the first `warmup` steps. Between the two steps of `decay` it falls from 1 to 0.
    """
    factor = 1.0 if warmup is None else min(1.0, (step + 1) / warmup)
    if decay is not None:
        start, end = decay
        factor *= min(1.0, max(0.0, (end - step) / (end - start)))
    return factor
