"""The rule that chooses between PyTorch and fastgan, with a clock that the tests set."""

from __future__ import annotations

import pytest
from torch import nn

from fastgan.launcher import timing
from fastgan.launcher.timing import LEAST_GAIN, PAIRS, Unit, Way, typical

STEPS = 20_000


@pytest.fixture
def train(monkeypatch):
    """Return a function that takes steps of given costs, and returns the unit, its ways and PyTorch's time over its."""
    monkeypatch.setattr(timing, "is_counting_possible", lambda: False)
    now = [0.0]
    monkeypatch.setattr(timing, "perf_counter", lambda: now[0])

    def run(cost, steps=STEPS, every=1, calls=1, size=lambda number: None):
        unit, ways, plain = Unit(nn.Linear(1, 1), (), "here", Way.FASTER), [], 0.0
        begin = now[0]
        for number in range(steps):
            step = unit.begin(size(number))
            step.start()
            now[0] += cost(number)[step.is_fused]
            plain += cost(number)[False]
            step.penalized = number % every == 0
            step.units = set(range(1 + number % calls))
            step.lap()
            step.end()
            ways.append(step.is_fused)
        return unit, ways, plain / (now[0] - begin)

    return run


def test_the_faster_half_of_the_times_counts():
    assert typical([1.0, 9.0, 1.2, 30.0]) == pytest.approx(1.1)  # two steps were interrupted


def test_both_take_turns_and_a_faster_fastgan_is_kept(train):
    unit, ways, speed = train(lambda number: (1.0, 0.7), 200)
    assert ways[:2] == [False, True]  # the step that shows the gradients, and the warm-up
    assert sum(ways[2 : 2 + 2 * PAIRS]) == PAIRS
    assert all(ways[2 + 2 * PAIRS :])
    assert (unit.time(False), unit.time(True)) == (pytest.approx(1.0), pytest.approx(0.7))
    assert speed > 1.35


SLOWER = {
    "much slower": (lambda number: (0.65, 1.0), 1),
    "a gain that may be noise": (lambda number: (1.0, 1.001 / LEAST_GAIN), 1),
    "a slow first step": (lambda number: (50.0, 50.0) if number < 2 else (1.0, 1.1), 1),
    "every third step of PyTorch is interrupted": (lambda number: (1.0 + 2 * (number % 3 == 0), 1.2), 1),
    "a penalty in every 16th step": (lambda number: (2.0, 3.0) if number % 16 == 0 else (1.0, 1.0), 16),
    "a penalty in every third step": (lambda number: (2.0, 3.0) if number % 3 == 0 else (1.0, 0.97), 3),
    "two penalized calls in every other step": (lambda number: (2.0, 3.1) if number % 2 else (1.0, 0.9), 1, 2),
}


@pytest.mark.parametrize("name", SLOWER)
def test_a_slower_fastgan_costs_less_than_three_percent(name, train):
    unit, ways, speed = train(*_of(SLOWER[name]))
    assert unit.kept is False
    assert speed > 0.97
    assert sum(ways) < STEPS / 20


FASTER = {
    "a penalty in every 16th step": (lambda number: (5.0, 3.0) if number % 16 == 0 else (1.0, 1.01), 16, 1.05),
    "a penalty in every fourth step": (lambda number: (3.0, 1.5) if number % 4 == 0 else (1.0, 1.02), 4, 1.2),
    "a slow first step of fastgan": (lambda number: (1.0, 500.0 if number == 1 else 0.8), 1, 1.15),
}


@pytest.mark.parametrize("name", FASTER)
def test_a_faster_fastgan_is_found_in_irregular_steps(name, train):
    *script, least = FASTER[name]
    unit, _, speed = train(*_of(script))
    assert unit.kept is True
    assert speed > least


def test_the_choice_is_checked_again_rarely_and_soon_at_another_size(train):
    def cost(number):
        return (1.0, 1.5) if number < 400 else (4.0, 2.0)

    _, ways, _ = train(cost, 1500, size=lambda number: 8 if number < 400 else 16)
    assert sum(ways[:400]) == PAIRS + 1  # in the first trial, and its warm-up
    assert all(ways[450:1300])
    _, ways, _ = train(cost, 1500)
    assert sum(ways[:900]) == PAIRS + 1
    assert all(ways[1000:])


def _of(script):
    cost, *others = script
    return cost, STEPS, *others
