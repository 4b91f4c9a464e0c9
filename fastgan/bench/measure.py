"""Measures cases one after another. Every finished case is on disk before the next one begins."""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from pathlib import Path
from threading import Timer
from typing import Any

import torch

from fastgan import backends
from fastgan.bench import timing
from fastgan.bench.case import BASELINE, OPTIONAL, Case, Run, prepare
from fastgan.bench.convolutions import convolutions
from fastgan.bench.flops import count_flops
from fastgan.bench.memory import peak_bytes, saved_bytes
from fastgan.bench.provenance import provenance
from fastgan.bench.record import SCHEMA, Results, save
from fastgan.ops.gradient_penalty.small import at_any_size

SAMPLE_SECONDS = {"cpu": 0.05, "cuda": 0.02}
# Suites that compare close times. Times depend on the addresses of a model's tensors, by up to 2 % (two Xeon threads).
# So their variants are built several times, until the standard errors of the median ratios are this small, or a tenth
# of the gain. On a CPU their samples are shorter. For the cases sizes/*/conv4-batch4 (one thread of an AMD EPYC with
# AVX2), the standard error after the same time fell from 2 to 3 % to 0.5 %.
CLOSE = {"sizes": 0.005, "forms": 0.005}
PARTS = {"cpu": 10, "cuda": 1}
FEWEST_BUILDS, MOST_BUILDS = 4, 16
UNTIMED = "memory"  # suite that measures memory; it times only one call per variant
LONGEST = 60.0  # time limit of a case in seconds with --keep-going; ten times that with --compile
STOPPED = 75  # exit status of a process that cannot continue; --resume continues the run


class DeviceLost(RuntimeError):
    """The process can no longer use its device, after an error in a kernel or in a graph capture."""


def begin(
    suite: str, names: Sequence[str], device: torch.device, rounds: int, *, command: str, optional: bool = False
) -> Results:
    """Create a result without cases."""
    timer = _timer(device)
    results: Results = {
        "schema": SCHEMA,
        "suite": suite,
        "provenance": provenance(device, command),
        "rounds": rounds,
        "compile": optional,
        "copy_bandwidth": timing.copy_bandwidth(device, timer),
        "matmul_rate": timing.matmul_rate(device, timer),
        "cases": [],
        "not_yet_run": list(names),
    }
    load = results["provenance"]["load_average"][0]
    if load > (os.cpu_count() or 1) / 2:
        print(f"fastgan bench: this machine is busy (load {load}): expect noisy results", file=sys.stderr)
    return results


def run_cases(
    results: Results,
    cases: Mapping[str, Case],
    device: torch.device,
    path: Path | None = None,
    *,
    minutes: float | None = None,
    keep_going: bool = False,
) -> None:
    """Measure the cases that have not run yet, in place.

    Args:
        minutes: start no case after this time.
        keep_going: record failures and skip them. A case that does not end terminates the process.

    Raises:
        DeviceLost: another process can continue with the remaining cases.
    """
    tried = False
    if keep_going and "begun" in results:
        _fail(results, results.pop("begun"), "the process ended during this case")
    end = None if minutes is None else time.monotonic() + 60 * minutes
    if path is not None:
        save(results, path)
    for name in with_progress(results["not_yet_run"], done=len(results["cases"])):
        if end is not None and time.monotonic() > end:
            print(f"fastgan bench: time is up, {len(results['not_yet_run'])} cases did not run", file=sys.stderr)
            break
        if not keep_going:
            results["cases"].append(measure(cases[name], device, results))
            results["not_yet_run"] = results["not_yet_run"][1:]
        elif name in results["not_yet_run"]:
            _require_working_device(device, tried)
            _try(cases[name], device, results, path)
            tried = True
        if path is not None:
            save(results, path)


def _try(case: Case, device: torch.device, results: Results, path: Path | None) -> None:
    results["begun"] = case.name
    if path is not None:
        save(results, path)
    end = Timer(LONGEST * (10 if results["compile"] else 1), _end, [case.name])
    end.daemon = True
    end.start()
    try:
        found = measure(case, device, results, keep_going=True)
    except Exception as error:
        _fail(results, case.name, f"{type(error).__name__}: {error}".partition("\n")[0])
    else:
        results["cases"].append(found)
        results["not_yet_run"] = results["not_yet_run"][1:]
    finally:
        end.cancel()
        del results["begun"]
        if path is not None:
            save(results, path)  # also after an interruption
    gc.collect()  # free the tensors that the error's frames hold


def _fail(results: Results, name: str, reason: str) -> None:
    print(f"FAILED {name}: {reason}", file=sys.stderr, flush=True)
    results.setdefault("failed", {})[name] = reason
    results["not_yet_run"] = [other for other in results["not_yet_run"] if other != name]


def _end(name: str) -> None:
    print(f"{name} exceeded its time limit", file=sys.stderr, flush=True)
    os._exit(STOPPED)


def _require_working_device(device: torch.device, tried: bool) -> None:
    """Raise if an earlier failure broke the device: a failed capture leaves its state behind, a failed kernel more."""
    if device.type != "cuda":
        return
    try:
        torch.rand(1, device=device).sum().item()
        torch.cuda.empty_cache()  # so that free memory is requested from the driver
    except RuntimeError as error:
        if not tried:
            raise
        raise DeviceLost(str(error).partition("\n")[0]) from None


def with_progress(names: Sequence[str], done: int = 0) -> Iterator[str]:
    """Yield the names, with a progress bar in a terminal, otherwise with one line each."""
    total = done + len(names)
    if sys.stderr.isatty():
        try:
            from tqdm import tqdm
        except ModuleNotFoundError:
            pass
        else:
            with tqdm(total=total, initial=done, unit="case", leave=False) as bar:
                for name in names:
                    bar.set_description(name)
                    yield name
                    bar.update()
            return
    for number, name in enumerate(names, done + 1):
        print(f"{number}/{total} {name}", file=sys.stderr, flush=True)
        yield name


def measure(case: Case, device: torch.device, results: Results, keep_going: bool = False) -> dict[str, Any]:
    """Check that the variants agree, then time them as ``results`` says; on CUDA also as graphs, if possible."""
    with _stream(device):
        return _measure(case, device, results, keep_going)


def _stream(device: torch.device) -> AbstractContextManager[Any]:
    """Use a stream that can be captured: a backward runs on the stream of its forward, which may have run earlier."""
    return torch.cuda.stream(_capturable(device)) if device.type == "cuda" else nullcontext()


@cache
def _capturable(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _measure(case: Case, device: torch.device, results: Results, keep_going: bool) -> dict[str, Any]:
    timer, rounds, seconds = _timer(device), results["rounds"], SAMPLE_SECONDS[device.type]
    failed: dict[str, str] | None = {} if keep_going else None
    if results["compile"]:
        torch._dynamo.reset()  # otherwise the same function of the next batch size is compiled for dynamic sizes
    variants, errors, left_out = prepare(case, device, optional=results["compile"], failed=failed)
    untimed = results["suite"] == UNTIMED
    close = CLOSE.get(results["suite"])
    parts = PARTS[device.type] if close else 1
    in_turns = partial(timing.in_turns, timer=timer, rounds=rounds, seconds=seconds, parts=parts)
    samples = timing.once(variants, timer) if untimed else in_turns(variants)
    if close:
        for build in range(2, MOST_BUILDS + 1):
            again, *_ = prepare(case, device, optional=results["compile"], failed=failed)
            for name, more in in_turns(again).items():
                samples[name] += more
            variants = again  # until now both existed, so the new tensors have new addresses
            if build >= FEWEST_BUILDS and timing.is_certain(samples, BASELINE, close):
                break
    measured = timing.compare(samples, BASELINE)
    floor = case.bytes / results["copy_bandwidth"] if case.bytes is not None else None
    for name, result in measured.items():
        result["error"] = errors[name]
        if floor is not None:
            result["floor_fraction"] = floor / result["seconds"]["median"]
        result |= _counts(case.counted, name, variants[name], device)
        if results["compile"] and results["suite"] == "steps" and (found := convolutions(name, variants[name])):
            result["convolutions"] = found
    if device.type == "cuda" and not untimed:
        for name, result in _graphs(variants, device, rounds, seconds / 10).items():
            if "seconds" in result and floor is not None:
                result["floor_fraction"] = floor / result["seconds"]["median"]
            measured[name]["graph"] = result
    return {
        "name": case.name,
        "family": case.family,
        "sizes": dict(case.sizes),
        "op": case.op,
        "dtype": str(case.dtype).removeprefix("torch."),
        "backend": backends.select(case.op, device, case.dtype) if case.op else None,
        "bytes": case.bytes,
        "operations": case.operations,
        "floor_seconds": floor,
        "tolerance": case.tolerance,
        "growth": None if case.growth is None else {of: _plain(value) for of, value in vars(case.growth).items()},
        "variants": measured,
        "left_out": left_out,
        **({} if case.about is None else {"about": case.about(device, case.dtype)}),
        **({"failed": sorted(failed)} if failed else {}),
    }


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else value


def _timer(device: torch.device) -> timing.Timer:
    return timing.cuda_events if device.type == "cuda" else timing.wall_clock


def _counts(counted: Sequence[str], name: str, run_variant: Run, device: torch.device) -> dict[str, int]:
    """Count what one call computes, holds and saves.

    A compiled graph has no count of operations and saved tensors, and no visible allocations on a CPU.
    """
    counts = {}
    compiled = name in OPTIONAL
    if "flops" in counted and not compiled:
        counts["flops"] = count_flops(run_variant)
    if "saved" in counted and not compiled:
        counts["saved_bytes"] = saved_bytes(run_variant)
    if "peak" in counted and not (compiled and device.type == "cpu"):
        counts["peak_bytes"] = peak_bytes(run_variant, device)
    return counts


def _graphs(variants: dict[str, Run], device: torch.device, rounds: int, seconds: float) -> dict[str, dict[str, Any]]:
    """Time replays of CUDA graphs, which show the device's own time, with data in memory instead of in L2."""
    tried = {name: _capture(run_variant) for name, run_variant in variants.items()}
    replays = {name: replay for name, replay in tried.items() if not isinstance(replay, str)}
    samples = timing.in_turns(replays, timing.ColdCache(device), rounds, seconds) if replays else {}
    failed = {name: {"reason": reason} for name, reason in tried.items() if isinstance(reason, str)}
    return failed | timing.compare(samples, BASELINE)


def _capture(run_variant: Run) -> timing.Call | str:
    """Return the replay of a graph, or the reason why capture fails."""
    try:
        with at_any_size():
            return timing.captured(run_variant)
    except RuntimeError as error:
        return str(error).partition("\n")[0]
