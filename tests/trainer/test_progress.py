from __future__ import annotations

import pytest
import torch

from fastgan.trainer import progress
from fastgan.trainer.progress import Progress, plain, why_slow

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_the_line_moves_at_every_step_with_rate_losses_and_memory(clock, capsys):
    with Progress("run", 8, 0.0, CPU, shown=True) as bar:
        shown = []
        for step in range(1, 5):
            clock[0] += 1.0
            bar.step(step, step / 10, torch.tensor([1.5, -0.25]))
            shown.append(bar.bar.n)
        assert shown == pytest.approx([0.1, 0.2, 0.3, 0.4])
        assert bar.rate() == 8.0
        assert bar.bar.postfix.startswith("step 4  D 1.500  G -0.250  8.0 images/s  ")
        assert bar.bar.postfix.endswith(" GB")


def test_the_rate_is_that_of_the_last_seconds(clock):
    bar = Progress("run", 1, 0.0, CPU, shown=True)
    for step in range(1, 301):
        clock[0] += 1.0 if step < 50 else 0.1
        bar.step(step, step / 300, torch.zeros(2))
    assert bar.rate() == pytest.approx(10, rel=0.01)
    bar.close()


def test_losses_are_read_twice_a_second_at_most(clock):
    class Losses:
        read = 0

        def tolist(self) -> list[float]:
            Losses.read += 1
            return [0.0, 0.0]

    bar = Progress("run", 1, 0.0, CPU, shown=True)
    for step in range(1, 101):
        clock[0] += 0.01
        bar.step(step, step / 100, Losses())  # type: ignore[arg-type]
    bar.close()
    assert Losses.read <= 3


def test_busy_cores_are_named_with_the_flag_that_helps(clock, monkeypatch, capsys):
    assert why_slow(0.9, 1.0, 2, load=3.0) is None
    assert why_slow(0.2, 1.0, 2, load=0.1) is None  # it waits for a disk, for example
    assert why_slow(0.2, 1.0, 4, load=3.0).endswith("this one computed 20% of the time: --threads 2 may be faster")
    assert "--threads" not in why_slow(0.2, 1.0, 1, load=3.0)
    monkeypatch.setattr(progress, "load", lambda: 3.0)
    monkeypatch.setattr(progress.time, "thread_time", lambda: 0.1 * clock[0])
    bar = Progress("run", 1, 0.0, CPU, shown=True)
    for step in range(1, 30):
        clock[0] += 1.0
        bar.step(step, 0.0, torch.zeros(2))
    bar.close()
    output = capsys.readouterr()
    assert (output.out + output.err).count("other programs use the cores") == 1


@pytest.mark.parametrize(("number", "text"), [(123456.7, "123,457"), (100, "100"), (12.34, "12.3"), (0.4567, "0.46")])
def test_rates_are_plain_numbers(number, text):
    assert plain(number) == text
