from __future__ import annotations

import gc
import random

import pytest
import torch

from fastgan.bench import timing


class Machine:
    """A clock that advances only with calls and can be slowed down."""

    def __init__(self):
        self.now = 0.0
        self.slowness = 1.0
        self.called: list[str] = []

    def variant(self, name, seconds):
        def run():
            self.called.append(name)
            self.now += seconds * self.slowness

        return run

    def timer(self, run, repeats):
        return timing.wall_clock(run, repeats, clock=lambda: self.now)


def test_quantiles_are_those_of_20_50_and_80_percent():
    assert timing.quantiles([float(i) for i in range(11)][::-1]) == {"low": 2.0, "median": 5.0, "high": 8.0}
    assert timing.quantiles([3.0]) == {"low": 3.0, "median": 3.0, "high": 3.0}


def test_wall_clock_gives_the_mean_of_the_calls():
    machine = Machine()
    assert machine.timer(machine.variant("a", 0.25), 8) == pytest.approx(0.25)
    assert machine.called == ["a"] * 8


def test_each_round_has_every_variant_and_none_always_comes_first():
    machine = Machine()
    variants = {name: machine.variant(name, 1.0) for name in "abc"}
    samples = timing.in_turns(variants, machine.timer, rounds=6, seconds=1.0)
    assert {name: len(own) for name, own in samples.items()} == {"a": 6, "b": 6, "c": 6}
    rounds = ["".join(machine.called[-18:][i : i + 3]) for i in range(0, 18, 3)]
    assert rounds == ["abc", "bca", "cab"] * 2


def test_a_sample_has_as_many_calls_as_fill_its_time():
    machine = Machine()
    variants = {"fast": machine.variant("fast", 0.001), "slow": machine.variant("slow", 5.0)}
    timing.in_turns(variants, machine.timer, rounds=1, seconds=0.1)
    turns = 2  # one warms up
    assert machine.called.count("fast") == 1 + 3 * 2 + turns * 100  # three samples of two calls to calibrate
    assert machine.called.count("slow") == 1 + turns  # one call is enough to see that it is long


def test_parts_divide_a_round_into_shorter_ones():
    machine = Machine()
    variants = {"a": machine.variant("a", 0.01), "b": machine.variant("b", 0.02)}
    samples = timing.in_turns(variants, machine.timer, rounds=2, seconds=0.1, parts=10)
    assert {name: len(own) for name, own in samples.items()} == {"a": 10, "b": 10}  # five calls of b fit
    assert "".join(machine.called[-30:]) == ("aab" + "baa") * 5
    longer = timing.in_turns({"slow": machine.variant("slow", 1.0)}, machine.timer, rounds=2, seconds=0.1, parts=10)
    assert len(longer["slow"]) == 2


def test_once_calls_each_variant_once():
    machine = Machine()
    samples = timing.once({"a": machine.variant("a", 2.0), "b": machine.variant("b", 3.0)}, machine.timer)
    assert samples == {"a": [2.0], "b": [3.0]}
    assert machine.called == ["a", "b"]


def test_a_machine_that_slows_down_leaves_the_ratio_of_each_round():
    machine = Machine()
    variants = {"base": machine.variant("base", 3.0), "ours": machine.variant("ours", 1.0)}

    def timer(run, repeats):
        if len(machine.called) % 2 == 0:
            machine.slowness *= 1.5
        return machine.timer(run, repeats)

    samples = timing.in_turns(variants, timer, rounds=5, seconds=1e-3)
    assert max(samples["base"]) > 4 * min(samples["base"])
    result = timing.compare(samples, "base")
    assert result["ours"]["ratio"] == pytest.approx({"low": 3.0, "median": 3.0, "high": 3.0})
    assert result["base"]["ratio_of_medians"] == 1.0


def test_compare_tells_the_ratio_of_medians_from_the_median_of_ratios():
    result = timing.compare({"base": [2.0, 4.0, 9.0], "ours": [1.0, 4.0, 3.0]}, "base")["ours"]
    assert result["ratio_of_medians"] == pytest.approx(4 / 3)
    assert result["ratio"]["median"] == 2.0
    assert result["seconds"]["median"] == 3.0


def test_without_a_baseline_there_are_times_and_no_ratios():
    assert timing.compare({"ours": [1.0]}, "base")["ours"].keys() == {"seconds"}


def test_the_error_of_a_median_is_that_of_a_normal_distribution():
    generator = random.Random(0)
    samples = [generator.gauss(1.0, 0.05) for _ in range(1000)]
    assert timing.error_of_median(samples) == pytest.approx(0.05 * 1.2533 / 1000**0.5, rel=0.1)
    assert timing.error_of_median(samples[:250]) == pytest.approx(2 * timing.error_of_median(samples), rel=0.15)


def test_a_clear_gain_is_certain_sooner_than_a_close_ratio():
    generator = random.Random(0)
    base = [generator.gauss(100, 5) for _ in range(16)]  # a standard error of 1.6 %
    assert timing.is_certain({"base": base, "ours": [50.0] * 16}, "base", 0.005)
    assert not timing.is_certain({"base": base, "ours": [100.0] * 16}, "base", 0.005)
    assert not timing.is_certain({"base": base, "ours": [200.0] * 16}, "base", 0.005)
    assert not timing.is_certain({"base": base, "ours": [50.0] * 16, "other": [100.0] * 16}, "base", 0.005)
    assert timing.is_certain({"base": base, "same": base}, "base", 0.005)


def test_garbage_is_collected_again_after_a_failure():
    def fail():
        raise RuntimeError("broken")

    def timer(run, repeats):
        if not gc.isenabled():
            run()
        return 1.0

    with pytest.raises(RuntimeError, match="broken"):
        timing.in_turns({"a": fail}, timer, rounds=1, seconds=1.0)
    assert gc.isenabled()


def test_copy_bandwidth_counts_what_is_read_and_what_is_written():
    times = iter([9.0, *[2.0] * 4, 4.0, *[8.0] * 4])  # the first warms up; the median of the others is 4
    copied = []

    def timer(run, repeats):
        copied.append(run())
        return next(times)

    assert timing.copy_bandwidth(torch.device("cpu"), timer, size=4096) == 2 * 4096 / 4.0
    assert all(target.nbytes == 4096 for target in copied)


@pytest.mark.gpu
def test_events_and_graphs_time_what_the_device_does():
    device = torch.device("cuda")
    x = torch.ones(2**26, device=device)
    one, four = (lambda: x.mul_(1.0)), (lambda: [x.mul_(1.0) for _ in range(4)])
    for timer, wrap in ((timing.cuda_events, lambda run: run), (timing.ColdCache(device), timing.captured)):
        short, long = (timer(wrap(run), 20) for run in (one, four))
        assert 3 < long / short < 5
