from __future__ import annotations

import pytest
import torch

from fastgan.trainer import progress
from fastgan.trainer.probe import PARTS, SMALL, Probe, probe
from fastgan.trainer.progress import Progress, plain

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


def test_busy_cores_are_named_once_after_two_probes_and_not_when_one_is_slow(clock, monkeypatch, capsys):
    free, busy = Probe(1.0, 1.0, 0.5), Probe(1.0, 3.0, 9.0)
    results = iter([busy, free, free, busy, busy])
    probed = []

    def next_probe() -> Probe:
        probed.append(clock[0])
        return next(results)

    monkeypatch.setattr(progress, "probe", next_probe)
    bar = Progress("run", 8, 0.0, CPU, shown=True)
    for step in range(1, 400):
        clock[0] += 1.0
        bar.step(step, 0.0, torch.zeros(2))
    bar.close()
    assert probed == [5, 10, 70, 130, 135]
    output = capsys.readouterr()
    assert (output.out + output.err).count("other programs use the cores") == 1


def test_a_line_about_busy_cores_compares_with_free_ones_and_names_the_flag():
    assert Probe(free=1.0, one=1.0, all=0.6).warning(2) is None
    assert Probe(free=1.0, one=3.0, all=0.2).warning(8) is None
    line = Probe(free=1.0, one=2.0, all=20.0).warning(2)
    assert "40 times as slow as on free cores; --threads 1 is faster now, 10.0 times in a short test" in line
    assert Probe(free=1.0, one=9.0, all=2.0).warning(8).endswith("16 times as slow as on free cores; try --threads 4")
    assert "--threads" not in Probe(free=1.0, one=9.0, all=9.0).warning(1)


def test_a_probe_compares_the_same_work():
    before = torch.get_num_threads()
    found = probe()
    assert torch.get_num_threads() == before
    assert 0 < found.free <= found.one
    whole, part = torch.zeros(PARTS, SMALL), torch.zeros(SMALL)
    assert whole.numel() == PARTS * part.numel()
    assert part.numel() < 32768  # from this size on, PyTorch shares element-wise work among threads
    assert 0.2 * found.free < found.all  # one thread here


@pytest.mark.parametrize(("number", "text"), [(123456.7, "123,457"), (100, "100"), (12.34, "12.3"), (0.4567, "0.46")])
def test_rates_are_plain_numbers(number, text):
    assert plain(number) == text
