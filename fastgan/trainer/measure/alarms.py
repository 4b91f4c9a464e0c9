"""Alarms: common failures of GANs, how diagnostics reveal them, and which flags to try."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

Record = dict[str, Any]  # a line of metrics.jsonl with diagnostics


@dataclass(frozen=True)
class Alarm:
    name: str
    sign: Callable[[Record], str | None]  # describes the problem in a record, or returns None
    patience: int  # number of records whose median must show the problem, so that one bad batch raises no alarm
    remedy: str
    from_step: int = 0  # first step to check; an untrained generator has little diversity, which is not collapse


def diverging(record: Record) -> str | None:
    """Weights jump or losses explode: steps overshoot."""
    if record["nonfinite"]:
        return f"{record['nonfinite']:.0f} weights or gradients are infinite or NaN"
    for key, player in (("d", "discriminator"), ("g", "generator")):
        if record.get(f"{key}_update_ratio", 0.0) > 0.1:
            return f"one step of the {player} changes its weights by {record[f'{key}_update_ratio']:.0%} of their norm"
        if not abs(record[f"{key}_loss"]) < 1e3:
            return f"the {player}'s loss is {record[f'{key}_loss']:.3g}"
    return None


def vanishing(record: Record) -> str | None:
    """The discriminator classifies everything correctly, and its gradient no longer reaches the generator."""
    won = min(record["d_real_accuracy"], record["d_fake_accuracy"]) >= 0.95
    if won and record["g_grad_norm"] < 2e-3:
        return (
            f"the discriminator classifies {record['d_fake_accuracy']:.0%} of the fakes correctly, and the generator's "
            f"gradient has norm {record['g_grad_norm']:.1e}"
        )
    return None


def collapsing(record: Record) -> str | None:
    """A batch of fakes contains far fewer different samples than a batch of reals."""
    if record["diversity"] < 0.3:
        return f"a batch of samples is only {record['diversity']:.0%} as diverse as a batch of reals"
    return None


def overfitting(record: Record) -> str | None:
    """The discriminator has memorized its training images: unseen reals look like fakes to it."""
    if record["d_real_accuracy"] >= 0.6 and record.get("overfit", 0.0) > 0.3:
        return (
            f"the mean logit is {record['d_train']:.2f} on training images, {record['d_held_out']:.2f} on unseen reals "
            f"and {record['d_fake']:.2f} on fakes"
        )
    return None


ALARMS = (
    Alarm("divergence", diverging, 3, "lower --d-lr and --g-lr, or bound the discriminator: --spectral-norm fused"),
    Alarm(
        "vanishing gradient",
        vanishing,
        3,
        "--loss non-saturating; weaken the discriminator with a lower --d-lr or --penalty r1",
    ),
    Alarm(
        "mode collapse",
        collapsing,
        5,
        "--spectral-norm fused, --minibatch discrimination, --pack 2; lower --g-lr or raise --d-steps",
        from_step=200,
    ),
    Alarm(
        "overfitting",
        overfitting,
        5,
        "--augment ada, then a lower --ada-target; more images, --penalty r1 or a smaller --width",
    ),
)


class Watch:
    """Raises each alarm once."""

    def __init__(self, alarms: Iterable[Alarm] = ALARMS) -> None:
        self.alarms = tuple(alarms)
        self.recent: deque[Record] = deque(maxlen=max(alarm.patience for alarm in self.alarms))
        self.raised: set[str] = set()

    def look(self, record: Record) -> list[Record]:
        """Return the alarms that this record raises, as new records."""
        self.recent.append(record)
        found = []
        for alarm in self.alarms:
            waiting = len(self.recent) < alarm.patience or record["step"] < alarm.from_step
            if waiting or alarm.name in self.raised:
                continue
            what = alarm.sign(median(list(self.recent)[-alarm.patience :]))
            if what:
                self.raised.add(alarm.name)
                found.append({"step": record["step"], "alarm": alarm.name, "what": what, "try": alarm.remedy})
        return found

    def replay(self, records: Iterable[Record]) -> None:
        """Continue from a run's earlier records, without raising their alarms again."""
        for record in records:
            if "nonfinite" in record:
                self.look(record)


def median(records: list[Record]) -> Record:
    """Return the median of each number that all records contain."""
    return {
        key: statistics.median(record[key] for record in records)
        for key, value in records[0].items()
        if isinstance(value, int | float) and all(key in record for record in records)
    }


def describe(alarm: Record) -> str:
    return f"step {alarm['step']}: {alarm['alarm']}: {alarm['what']}. Try: {alarm['try']}"
