"""The progress line of a run: it moves at every step."""

from __future__ import annotations

import math
import sys
import time
from collections import deque

import torch
from torch import Tensor
from tqdm import tqdm

from fastgan.trainer.probe import probe

WINDOW = 10.0  # seconds over which the rate is measured
REDRAW = 0.5  # seconds between readings of the losses, which wait for the device
LOGGED = 10.0  # seconds between lines that do not go to a terminal
FIRST_PROBE, NEXT_PROBE, LATER_PROBES = 5.0, 5.0, 60.0  # seconds before the first probe, one that confirms it, others


class Progress:
    """Shows the share that is done, the time left, the rate, the losses and the memory. Use it as a context."""

    def __init__(self, name: str, images_per_step: int, done: float, device: torch.device, shown: bool) -> None:
        self.images_per_step, self.device = images_per_step, device
        self.steps: deque[tuple[float, int]] = deque()  # time and step number over the last seconds
        self.drawn = 0.0
        # The slowness of cores matters if they do the work. It is reported once, when two probes in a row find it.
        self.probe_at = time.monotonic() + FIRST_PROBE if device.type == "cpu" and shown else math.inf
        self.suspected = False
        self.bar = tqdm(
            total=1.0,
            initial=done,
            desc=name,
            bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}",
            mininterval=0.1 if sys.stderr.isatty() else LOGGED,
            disable=not shown,
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()

    def close(self) -> None:
        self.bar.close()

    def write(self, line: str) -> None:
        self.bar.write(line)

    def step(self, number: int, done: float, losses: Tensor) -> None:
        """Move the line after step `number`. `losses` (2,) may still be on the device."""
        if self.bar.disable:
            return
        now = time.monotonic()
        self.steps.append((now, number))
        while self.steps[0][0] < now - WINDOW and len(self.steps) > 2:
            self.steps.popleft()
        if now - self.drawn >= REDRAW:
            self.drawn = now
            losses_now = "  ".join(f"{name} {loss:.3f}" for name, loss in zip("DG", losses.tolist(), strict=True))
            rate = f"{plain(self.rate())} images/s  {memory(self.device)}"
            self.bar.set_postfix_str(f"step {number:,}  {losses_now}  {rate}", refresh=False)
        self.bar.update(done - self.bar.n)
        if now >= self.probe_at:
            self._probe(now)

    def _probe(self, now: float) -> None:
        line = probe().warning(torch.get_num_threads())
        if line and self.suspected:
            self.write(line)
            self.probe_at = math.inf
            return
        self.suspected = line is not None
        self.probe_at = now + (NEXT_PROBE if line else LATER_PROBES)

    def rate(self) -> float:
        """Return the pictures a second over the last seconds."""
        (first, start), (last, end) = self.steps[0], self.steps[-1]
        return self.images_per_step * (end - start) / (last - first) if last > first else 0.0


def plain(number: float) -> str:
    """Write a rate with at most three digits that matter, never with an exponent."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.1f}" if number >= 1 else f"{number:.2g}"


def memory(device: torch.device) -> str:
    """Return the most memory that this process used so far, as text."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 2**30:.1f} GB"
    try:
        import resource
    except ImportError:  # Windows
        return ""
    unit = 1 if sys.platform == "darwin" else 1024
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30:.1f} GB"
