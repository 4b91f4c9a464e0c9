"""Times of the variants of one computation, taken in turns in one process.

A machine's clock and load drift. What disturbs one variant of a round disturbs its neighbours too, so the ratio of
each round is sound where times of separate runs are not.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

Call = Callable[[], object]
Timer = Callable[[Call, int], float]  # (what, how often) -> seconds a call

MOST_REPEATS = 10_000


def quantiles(samples: list[float]) -> dict[str, float]:
    """20, 50 and 80 % of the samples lie below these."""
    fifths = statistics.quantiles(samples, n=5, method="inclusive") if len(samples) > 1 else samples * 4
    return {"low": fifths[0], "median": statistics.median(samples), "high": fifths[3]}


def in_turns(variants: Mapping[str, Call], timer: Timer, rounds: int, seconds: float) -> dict[str, list[float]]:
    """Seconds a call, of each variant in each round; a sample is the mean of as many calls as take ``seconds``."""
    repeats = {}
    for name, run in variants.items():
        undisturbed = timer(run, 1)
        if undisturbed < 4 * seconds:  # else one call fills a sample, whatever disturbed it
            undisturbed = min(timer(run, 2) for _ in range(3))
        repeats[name] = max(1, min(MOST_REPEATS, round(seconds / max(undisturbed, 1e-9))))
    names = list(variants)
    samples: dict[str, list[float]] = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for turn in range(-1, rounds):  # the first warms up
            first = turn % len(names)  # so that none always follows the same neighbour's caches
            for name in names[first:] + names[:first]:
                sample = timer(variants[name], repeats[name])
                if turn >= 0:
                    samples[name].append(sample)
    finally:
        if collecting:
            gc.enable()
    return samples


def once(variants: Mapping[str, Call], timer: Timer) -> dict[str, list[float]]:
    """Seconds of one call of each variant: what it takes, where that is not what is asked."""
    return {name: [timer(run, 1)] for name, run in variants.items()}


def compare(samples: Mapping[str, list[float]], baseline: str) -> dict[str, dict[str, Any]]:
    """Of each variant: quantiles of its seconds and, if the baseline was timed, how many times as fast it is.

    ``ratio`` has the quantiles of the ratios of each round, ``ratio_of_medians`` is what it says.
    """
    result: dict[str, dict[str, Any]] = {name: {"seconds": quantiles(own)} for name, own in samples.items()}
    base = samples.get(baseline)
    if base is not None:
        for name, own in samples.items():
            result[name]["ratio_of_medians"] = statistics.median(base) / statistics.median(own)
            result[name]["ratio"] = quantiles([b / o for b, o in zip(base, own, strict=True)])
    return result


def wall_clock(run: Call, repeats: int, clock: Callable[[], float] = time.perf_counter) -> float:
    started = clock()
    for _ in range(repeats):
        run()
    return (clock() - started) / repeats


def cuda_events(run: Call, repeats: int) -> float:
    """Calls one after another, as a training loop makes them: where the host is the slower, its time shows."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3 / repeats


class ColdCache:
    """Times each call with the L2 cache full of something else, as the layers between two steps leave it.

    Only for what the device runs by itself (a CUDA graph): emptying the cache would hide a host's time.
    """

    def __init__(self, device: torch.device) -> None:
        size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
        self.other = torch.zeros(size // 4, device=device)

    def __call__(self, run: Call, repeats: int) -> float:
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        for start, end in pairs:
            self.other.sum()  # reads: lines that were written would be written back at the expense of what is timed
            start.record()
            run()
            end.record()
        torch.cuda.synchronize()
        return sum(float(start.elapsed_time(end)) for start, end in pairs) / 1e3 / repeats


def captured(run: Call) -> Call:
    """A CUDA graph's replay of ``run``. Raises RuntimeError if it cannot be captured.

    A stream of one's own that is the current one is captured: a backward goes to the stream that its forward was on.
    """
    before = torch.cuda.current_stream()
    stream = torch.cuda.Stream() if before == torch.cuda.default_stream() else before
    stream.wait_stream(before)
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    before.wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream):
            run()
    except RuntimeError:
        torch.cuda.set_stream(before)  # which it leaves undone where the capture was broken off
        raise
    graph.replay()
    torch.cuda.synchronize()
    return graph.replay


def copy_bandwidth(device: torch.device, timer: Timer, size: int = 2**29) -> float:
    """Bytes read and written a second by a copy of ``size`` bytes, too many for any cache; median of nine."""
    source = torch.ones(size, dtype=torch.uint8, device=device).view(torch.float32)
    target = torch.empty_like(source)
    repeats = 20 if device.type == "cuda" else 1
    times = [timer(lambda: target.copy_(source), repeats) for _ in range(10)]
    return 2 * size / statistics.median(times[1:])


def matmul_rate(device: torch.device, timer: Timer, side: int | None = None) -> float:
    """Floating-point operations a second of a large float32 matrix product, in the precision that PyTorch chooses."""
    side, repeats = (side or 8192, 5) if device.type == "cuda" else (side or 2048, 1)
    a, b = (torch.ones(side, side, device=device) for _ in range(2))
    out = torch.empty_like(a)
    times = [timer(lambda: torch.mm(a, b, out=out), repeats) for _ in range(6)]
    return 2 * side**3 / statistics.median(times[1:])
