"""Times the variants of one computation alternately, in one process.

A machine's clock and load drift. A disturbance of one variant also affects the others of the same round, so the ratio
within each round is reliable, while times of separate runs are not.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping
from statistics import NormalDist
from typing import Any

import torch

Call = Callable[[], object]
Timer = Callable[[Call, int], float]  # (call, repeats) -> seconds per call

MOST_REPEATS = 10_000


def quantiles(samples: list[float]) -> dict[str, float]:
    """Return the 20, 50 and 80 % quantiles of the samples."""
    fifths = statistics.quantiles(samples, n=5, method="inclusive") if len(samples) > 1 else samples * 4
    return {"low": fifths[0], "median": statistics.median(samples), "high": fifths[3]}


def in_turns(
    variants: Mapping[str, Call], timer: Timer, rounds: int, seconds: float, parts: int = 1
) -> dict[str, list[float]]:
    """Return seconds per call of each variant in each round. A sample averages as many calls as fit in ``seconds``.

    Args:
        parts: divide each round into this many, if each variant has so many calls. For the same time, the ratios of
            short samples are more certain: a disturbance that outlasts a round slows all variants down.
    """
    repeats = {}
    for name, run in variants.items():
        undisturbed = timer(run, 1)
        if undisturbed < 4 * seconds:  # otherwise one call fills a sample, even if something disturbed it
            undisturbed = min(timer(run, 2) for _ in range(3))
        repeats[name] = max(1, min(MOST_REPEATS, round(seconds / max(undisturbed, 1e-9))))
    parts = min(parts, *repeats.values())
    repeats = {name: count // parts for name, count in repeats.items()}
    names = list(variants)
    samples: dict[str, list[float]] = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for turn in range(-1, parts * rounds):  # the first round is a warm-up
            first = turn % len(names)  # rotate, so that no variant always runs after the same one
            for name in names[first:] + names[:first]:
                sample = timer(variants[name], repeats[name])
                if turn >= 0:
                    samples[name].append(sample)
    finally:
        if collecting:
            gc.enable()
    return samples


def once(variants: Mapping[str, Call], timer: Timer) -> dict[str, list[float]]:
    """Return the seconds of one call of each variant, for suites that do not measure time."""
    return {name: [timer(run, 1)] for name, run in variants.items()}


def compare(samples: Mapping[str, list[float]], baseline: str) -> dict[str, dict[str, Any]]:
    """Return quantiles of each variant's seconds and, if the baseline was timed, of its relative speed.

    ``ratio`` has the quantiles of the ratios within each round. ``ratio_of_medians`` is the ratio of the medians.
    """
    result: dict[str, dict[str, Any]] = {name: {"seconds": quantiles(own)} for name, own in samples.items()}
    base = samples.get(baseline)
    if base is not None:
        for name, own in samples.items():
            result[name]["ratio_of_medians"] = statistics.median(base) / statistics.median(own)
            result[name]["ratio"] = quantiles([b / o for b, o in zip(base, own, strict=True)])
    return result


def is_certain(samples: Mapping[str, list[float]], baseline: str, error: float) -> bool:
    """Whether each median ratio has at most this standard error, or one of a tenth of the gain that it shows."""
    for own in (own for name, own in samples.items() if name != baseline):
        ratios = [b / o for b, o in zip(samples[baseline], own, strict=True)]
        if error_of_median(ratios) > max(error, (statistics.median(ratios) - 1) / 10):
            return False
    return True


def error_of_median(samples: list[float]) -> float:
    """Return the standard error of the median of a normal distribution with the same 20 and 80 % quantiles."""
    of = quantiles(samples)
    deviation = (of["high"] - of["low"]) / (2 * NormalDist().inv_cdf(0.8))
    return deviation * math.sqrt(math.pi / 2 / len(samples))


def wall_clock(run: Call, repeats: int, clock: Callable[[], float] = time.perf_counter) -> float:
    started = clock()
    for _ in range(repeats):
        run()
    return (clock() - started) / repeats


def cuda_events(run: Call, repeats: int) -> float:
    """Time consecutive calls, as in a training loop. If the host is slower than the device, this is the host's time."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3 / repeats


class ColdCache:
    """Times each call with other data in the L2 cache, as the layers between two steps leave it.

    Use it only for work that the device runs alone (a CUDA graph): filling the cache would hide the host's time.
    """

    def __init__(self, device: torch.device) -> None:
        size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
        self.other = torch.zeros(size // 4, device=device)

    def __call__(self, run: Call, repeats: int) -> float:
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        for start, end in pairs:
            self.other.sum()  # read only: written lines would have to be written back during the timed call
            start.record()
            run()
            end.record()
        torch.cuda.synchronize()
        return sum(float(start.elapsed_time(end)) for start, end in pairs) / 1e3 / repeats


def captured(run: Call) -> Call:
    """Return the replay of a CUDA graph of ``run``. Raises RuntimeError if it cannot be captured.

    If the current stream is not the default one, that stream is captured: a backward runs on its forward's stream.
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
        torch.cuda.set_stream(before)  # an aborted capture does not restore the stream
        raise
    graph.replay()
    torch.cuda.synchronize()
    return graph.replay


def copy_bandwidth(device: torch.device, timer: Timer, size: int = 2**29) -> float:
    """Return bytes read and written per second by a copy of ``size`` bytes, too many for any cache; median of nine."""
    source = torch.ones(size, dtype=torch.uint8, device=device).view(torch.float32)
    target = torch.empty_like(source)
    repeats = 20 if device.type == "cuda" else 1
    times = [timer(lambda: target.copy_(source), repeats) for _ in range(10)]
    return 2 * size / statistics.median(times[1:])


def matmul_rate(device: torch.device, timer: Timer, side: int | None = None) -> float:
    """Return float32 operations per second of a large matrix product, in the precision that PyTorch chooses."""
    side, repeats = (side or 8192, 5) if device.type == "cuda" else (side or 2048, 1)
    a, b = (torch.ones(side, side, device=device) for _ in range(2))
    out = torch.empty_like(a)
    times = [timer(lambda: torch.mm(a, b, out=out), repeats) for _ in range(6)]
    return 2 * side**3 / statistics.median(times[1:])
