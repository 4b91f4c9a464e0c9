"""Compares two results of the same cases on the same device: which variants became faster or slower beyond noise.

The compared number is the speed relative to the baseline of the same run, so that a drifting machine affects neither
run. A difference counts if the bands from 20 to 80 % of the two runs do not overlap, or if peak memory changes by more
than a hundredth. A variant that was measured before and cannot be measured now is a regression.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastgan.bench.case import BASELINE, OPTIONAL
from fastgan.bench.heap import GIVEN_BACK
from fastgan.bench.record import Results, listed, names
from fastgan.words import number_of

REGRESSION, IMPROVEMENT = "REGRESSION", "improvement"
SPEED_UP, GRAPH = "speed-up", "speed-up, CUDA graph"
UNKNOWN = "not measured"  # for example by a version that no longer has the variant
MEMORY_NOISE = 0.01

Quantiles = dict[str, float]


@dataclass(frozen=True)
class Change:
    """One variant of one case in two runs. ``reason`` says why the second run did not measure it."""

    case: str
    variant: str
    what: str  # speed-up, speed-up of its CUDA graph, or peak MB
    old: Quantiles
    new: Quantiles | None
    more_is_better: bool = True
    seconds: float | None = None  # new time divided by old time
    reason: str = ""

    @property
    def verdict(self) -> str:
        if self.new is None:
            return REGRESSION
        if self.new["high"] < self.old["low"]:
            return REGRESSION if self.more_is_better else IMPROVEMENT
        if self.new["low"] > self.old["high"]:
            return IMPROVEMENT if self.more_is_better else REGRESSION
        return ""


def refuse_others(old: Results, path: object, new: Results, only: Sequence[str] | None = None) -> None:
    """Raise if two results cannot be compared.

    Args:
        old: the older result, loaded from ``path`` with ``record.load``.
        new: the result to compare with it; its cases may still be unmeasured.
        only: names of the old cases to compare; None compares all.

    Raises:
        ValueError: the results have different devices, numbers of threads, treatments of freed memory, or cases.
    """
    then, now = old["provenance"], new["provenance"]
    for what in ("device", "threads") if now["device_type"] == "cpu" else ("device",):
        if then[what] != now[what]:
            raise ValueError(f"{path} has {what} {then[what]}, this run has {now[what]}: they cannot be compared")
    was, is_now = (about.get("freed_memory", GIVEN_BACK) for about in (then, now))  # older files lack the key
    if now["device_type"] == "cpu" and was != is_now:
        raise ValueError(f"{path} has freed memory {was}, this run has it {is_now}: they cannot be compared")
    before = [name for name in names(old) if only is None or name in only]
    measured = [case["name"] for case in old["cases"]]
    missing = [name for name in names(new) if name not in measured]
    gone = [name for name in before if name not in names(new)]
    if missing or gone:
        parts = [f"it lacks {listed(missing)}"] * bool(missing) + [f"this run lacks {listed(gone)}"] * bool(gone)
        raise ValueError(f"{path} has other cases: {'; '.join(parts)}")


def changes(old: Results, new: Results) -> list[Change]:
    before = {case["name"]: case["variants"] for case in old["cases"]}
    found = []
    for case in new["cases"]:
        for variant, earlier in before[case["name"]].items():
            result, reason = case["variants"].get(variant), case["left_out"].get(variant)
            if result is not None:
                found += _of_variant(case["name"], variant, earlier, result)
            elif reason is not None or variant not in OPTIONAL:  # otherwise it was not requested
                found.append(_missing(case["name"], variant, SPEED_UP, earlier, reason))
    return found


def _of_variant(case: str, variant: str, old: dict[str, Any], new: dict[str, Any]) -> list[Change]:
    seconds = new["seconds"]["median"] / old["seconds"]["median"]
    graph, new_graph = (result.get("graph", {}) for result in (old, new))
    found = []
    if variant != BASELINE and "ratio" in old and "ratio" in new:
        found.append(Change(case, variant, SPEED_UP, old["ratio"], new["ratio"], seconds=seconds))
        if "ratio" in graph and "ratio" in new_graph:
            found.append(Change(case, variant, GRAPH, graph["ratio"], new_graph["ratio"]))
    if "seconds" in graph and "seconds" not in new_graph:
        found.append(_missing(case, variant, GRAPH, graph, new_graph.get("reason")))
    if "peak_bytes" in old and "peak_bytes" in new:
        before, now = (_band(result["peak_bytes"] / 1e6) for result in (old, new))
        found.append(Change(case, variant, "peak MB", before, now, more_is_better=False))
    return found


def _missing(case: str, variant: str, what: str, old: dict[str, Any], reason: str | None) -> Change:
    if "ratio" not in old:  # the old run has no baseline
        return Change(case, variant, what.replace(SPEED_UP, "seconds"), old["seconds"], None, reason=reason or UNKNOWN)
    return Change(case, variant, what, old["ratio"], None, reason=reason or UNKNOWN)


def _band(value: float) -> Quantiles:
    half = MEMORY_NOISE / 2 * value
    return {"low": value - half, "median": value, "high": value + half}


def table(found: Sequence[Change]) -> str:
    """Format as Markdown, with changes beyond noise first."""
    order = {REGRESSION: 0, IMPROVEMENT: 1, "": 2}
    lines = [
        "| case | variant | of | then | now | now / then | seconds, now / then | |",
        "|---|---|---|---:|---:|---:|---:|---|",
    ]
    for change in sorted(found, key=lambda change: order[change.verdict]):
        old, new = change.old["median"], None if change.new is None else change.new["median"]
        now, share = ("none", "") if new is None else (f"{new:.3g}", f"{new / old:.2f}" if old else "")
        seconds = "" if change.seconds is None else f"{change.seconds:.2f}"
        verdict = f"{change.verdict}: {change.reason}" if change.reason else change.verdict
        cells = [change.case, change.variant, change.what, f"{old:.3g}", now, share, seconds, verdict]
        lines.append(f"| {' | '.join(cells)} |")
    verdicts = (REGRESSION, "regression"), (IMPROVEMENT, "improvement")
    counts = [number_of(sum(change.verdict == verdict for change in found), noun) for verdict, noun in verdicts]
    return "\n".join([*lines, "", f"{' and '.join(counts)} beyond the noise of both runs"])


def regressed(found: Sequence[Change]) -> bool:
    return any(change.verdict == REGRESSION for change in found)
