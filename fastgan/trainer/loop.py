"""The training loop: step, log, sample, save, stop."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from fastgan import strict_json
from fastgan.trainer import checkpoint
from fastgan.trainer.config import FROM_HERE_ON, TrainConfig, described
from fastgan.trainer.data.drawn import Source
from fastgan.trainer.data.held_out import hold_out, require_batch
from fastgan.trainer.data.record import DataRecord, check_same, record_of
from fastgan.trainer.data.sources import Images, load_source
from fastgan.trainer.device import choose_device
from fastgan.trainer.errors import CheckpointError, NonFiniteLossError
from fastgan.trainer.export import write_export
from fastgan.trainer.gan import GAN
from fastgan.trainer.measure import alarms
from fastgan.trainer.measure.diagnostics import Diagnostics
from fastgan.trainer.measure.equilibrium import duality_gap
from fastgan.trainer.measure.quality import check_scoring, cost, score
from fastgan.trainer.progress import Progress
from fastgan.trainer.ranks import Ranks
from fastgan.trainer.report import gallery, pictures
from fastgan.trainer.report import page as report
from fastgan.trainer.run import MEASURING, RunFolder, replace_text
from fastgan.trainer.settings import flat
from fastgan.trainer.start import start_from

GRID_SAMPLES = 64
POINT_SAMPLES = 2000
LOSS_NAMES = ("discriminator", "generator")


class Trainer:
    """One run: its networks, its clock and its folder."""

    def __init__(self, config: TrainConfig) -> None:
        if config.tensorboard:
            from fastgan.trainer.report.tensorboard import (
                Board,  # import it before anything is written: its package may be missing
            )
        if config.score_every or (config.init_from and config.init_from.suffix == ".safetensors"):
            import_module("safetensors")
        if config.threads:
            torch.set_num_threads(config.threads)
        self.config = config
        self.run = RunFolder(config)
        self.ranks = Ranks.here(choose_device(config.device))
        self.device = self.ranks.device
        self.writes = self.ranks.rank == 0  # every rank computes and measures, only rank 0 writes
        # Each run has four random streams: seed * 4 + (weights, latents, data, pictures).
        seed = 4 * config.seed
        source = load_source(config.dataset, seed + 2, self.device, config.data, config.image_size, config.pictures)
        self._describe(source)
        check_scoring(config.extractor, source, self.device)  # fail now, not after hours of training
        state = self._newest_state() if config.resume else None
        self.data = record_of(source)
        known = DataRecord.read(self.run.data) if state else None
        digest = state["data"].get("digest") if state and "data" in state else None
        same = check_same(digest, known, self.data, config.data_changed_ok)
        kept = known.held_out if known is not None and not same else ()
        self.held_out = hold_out(source, config.optim.batch_size, seed + MEASURING, kept)
        require_batch(source, config.optim.batch_size)
        if self.data is not None and isinstance(self.held_out, Images):
            self.data.held_out = self.held_out.member_names()
        self.gan = GAN(config.model, config.optim, source, seed, self.device, self.ranks)
        if config.init_from and state is None:  # also in a run that was stopped before its first checkpoint
            start_from(self.gan, config, config.init_from, quiet=not self.writes)
        self.diagnostics = Diagnostics(self.gan, self.held_out, seed + MEASURING)
        self.watch = alarms.Watch()
        points = len(source.shape) == 1
        self.fixed_noise = torch.randn(
            POINT_SAMPLES if points else GRID_SAMPLES,
            config.model.latent_dim,
            generator=torch.Generator().manual_seed(seed + 3),
            device="cpu",
        )
        self.step = 0
        self.seconds = 0.0
        self.pending: list[Tensor] = []  # losses since the last record, still on the device
        self.recorded_at = 0.0
        changed = self._resume(state) if config.resume else {}
        self.ranks.wait()  # until every rank has read the folder
        self.board = None
        try:
            if self.writes:
                self.run.open(config, self.data)
                if config.resume:
                    self.run.forget_after(self.step)
            if config.tensorboard and self.writes:
                self.board = Board(self.run.tensorboard, self.step)
            self._log(report.header(config, self.device, self.step) | ({"changed": changed} if changed else {}))
        except BaseException:
            if self.writes:
                self.run.undo()
            raise

    def train(self) -> int | None:
        """Train until a limit or a signal, then write a checkpoint, pictures and a report.

        Returns:
            The number of the signal that ended the run early, or None.

        Raises:
            NonFiniteLossError: a loss became infinite or NaN; the last good checkpoint is kept.
        """
        started = time.monotonic() - self.seconds
        self.recorded_at = self.seconds
        images = self.config.optim.batch_size
        with (
            received_signals() as signals,
            self._locked(),
            Progress(self.config.name, images, self.progress(), self.device, self.writes) as bar,
        ):
            while not self.ranks.any(self.progress() >= 1 or bool(signals)):
                if (self.step + 1) % self.config.log_every == 0:
                    self.diagnostics.before_step()
                self.pending.append(self.gan.step())
                self.step += 1
                self.seconds = time.monotonic() - started
                bar.step(self.step, self.progress(), self.pending[-1])
                if self.step % self.config.log_every == 0:
                    self._record(bar)
                if self.config.equilibrium_every and self.step % self.config.equilibrium_every == 0:
                    self._measure_equilibrium()
                if self.config.score_every and self.step % self.config.score_every == 0:
                    self._score()
                if self.writes and self.step % self.config.sample_every == 0:
                    self._draw()
                if any(
                    every and self.step % every == 0 for every in (self.config.checkpoint_every, self.config.keep_every)
                ):
                    self._save(bar)
            self._save(bar)
            if self.writes:
                bar.close()
                print("computing the final scores and writing the report…", flush=True)
                self._draw()
                self._summarize()
            if self.board:
                self.board.close()
            self.ranks.wait()
        return signals[0] if signals else None

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Release the lock at the end. If the first step of a new run fails, remove the run."""
        first = self.step
        try:
            yield
        except Exception:
            if self.step == first and self.writes:
                self.run.undo()
            raise
        finally:
            self.run.lock.release()

    def progress(self) -> float:
        """Return the fraction of the run that is done. It is 1 when either limit is reached."""
        share = self.step / self.config.steps
        if self.config.minutes:
            share = max(share, self.seconds / (60 * self.config.minutes))
        return min(share, 1.0)

    def _record(self, bar: Progress) -> None:
        """Check the losses since the last record and write their means. Only this waits for the device."""
        if not self.pending:
            return
        losses = torch.stack(self.pending).tolist()  # (steps, 2)
        first = self.step - len(losses) + 1
        for step, pair in enumerate(losses, first):
            for name, value in zip(LOSS_NAMES, pair, strict=True):
                if not math.isfinite(value):
                    raise NonFiniteLossError(
                        f"step {step}: the {name}'s loss is {value}; lower --d-lr and --g-lr, or "
                        f"look at the preceding steps in {self.run.metrics}"
                    )
        d_loss, g_loss = (sum(values) / len(losses) for values in zip(*losses, strict=True))
        images = self.config.optim.batch_size * len(losses)
        rate = images / (self.seconds - self.recorded_at)
        record = {
            "step": self.step,
            "seconds": round(self.seconds, 3),
            "images_per_s": round(rate, 1),
            "d_loss": d_loss,
            "g_loss": g_loss,
        } | self.diagnostics.observe(self.step)
        self._log(record)
        for alarm in self.watch.look(record):
            self._log(alarm)
            if self.writes:
                bar.write(alarms.describe(alarm))
        self.pending.clear()
        self.recorded_at = self.seconds

    def _measure_equilibrium(self) -> None:
        if self.held_out is not None:
            seed = 4 * self.config.seed + MEASURING + self.step
            self._log({"step": self.step, **duality_gap(self.gan, self.held_out, seed)})

    def _score(self) -> None:
        """Score the averaged generator on held-out data, and keep it if it is the best one so far."""
        seed = 4 * self.config.seed + MEASURING
        scores = score(self.gan, self.held_out, seed, self.config.extractor, self.config.scored)
        found = cost(scores)
        if found is None:
            return
        best = (
            min((record["cost"] for record in self.run.read_metrics() if "cost" in record), default=math.inf)
            if self.writes
            else math.inf
        )
        numbers = {key: value for key, value in scores.items() if isinstance(value, int | float)}
        if self.writes and found < best:
            data, weights = self._about_data(), self.gan.ema.module.state_dict()
            write_export(self.run.best, self.config, data, self.step, weights)
        self._log({"step": self.step, "cost": found, "scores": numbers})

    def _about_data(self) -> dict[str, Any]:
        source = self.gan.source
        return {
            "shape": list(source.shape),
            "scale": source.scale,
            "classes": self.gan.classes,
            "class_names": source.class_names,
            "digest": self.data.digest if self.data else None,
        }

    def _save(self, bar: Progress) -> None:
        self._record(bar)  # check the losses first, so that every checkpoint holds a finite state
        settings = {key: value for key, value in flat(self.config.to_json()).items() if key in FROM_HERE_ON}
        state = {"gan": self.gan.state_dict(), "seconds": self.seconds, "data": self._about_data()}
        state["settings"] = settings
        if self.writes:
            checkpoint.save(self.run.checkpoints, self.step, state, self.config.keep_every)
        if self.board:
            self.board.flush()

    def _log(self, record: dict[str, Any]) -> None:
        if self.writes:
            self.run.append_metrics(record)
        if self.board:
            self.board.write(record)

    def _describe(self, source: Source) -> None:
        """Print notes about the data in the user's folder."""
        if not self.writes or not source.notes:
            return
        print(f"data: {'; '.join(source.notes)}")
        if source.classes and not self.config.model.conditional:
            print("the networks do not use the classes: --conditional gives the labels to both")

    def _newest_state(self) -> dict[str, Any] | None:
        if not checkpoint.found_in(self.run.checkpoints):
            self._require_no_checkpoint_yet()
            return None
        state, damaged = checkpoint.load_newest(self.run.checkpoints)
        for message in damaged:
            print(f"{message}; continuing from step {state['step']}")
        return state

    def _require_no_checkpoint_yet(self) -> None:
        """Raise if the run has had a checkpoint. Starting from the beginning would delete what it has measured."""
        assert self.run.saved is not None
        steps = max((record.get("step", 0) for record in self.run.read_metrics()), default=0)
        if steps > self.run.saved.checkpoint_every or self.run.report.exists():  # writing the first one may have failed
            raise CheckpointError(
                f"{self.run.path} has metrics up to step {steps:,}, but its checkpoints are gone: put them back into "
                f"{self.run.checkpoints}, choose another --name, or start again with --overwrite instead of --resume"
            )

    def _resume(self, state: dict[str, Any] | None) -> dict[str, list[Any]]:
        """Continue from a checkpoint. Return the settings that differ from those before it, with both values."""
        if state is None:
            print(f"{self.run.path} has no checkpoint yet: starting from the beginning")
            return {}
        self.gan.load_state_dict(state["gan"])
        checkpoint.restore_rng(state)
        self.step, self.seconds = state["step"], state["seconds"]
        self.watch.replay(record for record in self.run.read_metrics() if record.get("step", 0) <= self.step)
        assert self.run.saved is not None
        before = flat(self.run.saved.to_json()) | state.get("settings", {})  # an older run's checkpoint lacks some
        now = flat(self.config.to_json())
        changed = {key: [before[key], now[key]] for key in FROM_HERE_ON if key in before and before[key] != now[key]}
        if changed and self.writes:
            print(f"from step {self.step:,} on: {described(changed)}")
        if self.progress() >= 1 and self.writes:
            print(f"the run has already reached its end at step {self.step:,}: --steps or --minutes moves it")
        return changed

    def _draw(self) -> None:
        samples = self.gan.samples(self.fixed_noise)
        pictures.save_samples(samples, self.gan.source, self.run.history / f"step-{self.step:08d}.png")
        pictures.save_samples(samples, self.gan.source, self.run.samples)
        if self.board:
            self.board.draw("samples", self.run.samples, self.step)

    def _summarize(self) -> None:
        seed = 4 * self.config.seed + MEASURING
        if len(self.gan.source.shape) > 1:
            rows = gallery.interpolations(self.gan, seed)
            pictures.save_samples(rows, self.gan.source, self.run.interpolations, gallery.COLUMNS)
            near = gallery.nearest_reals(self.gan, self.gan.samples(self.fixed_noise[: gallery.ROWS]), seed)
            pictures.save_samples(near, self.gan.source, self.run.nearest, 1 + gallery.NEAREST)
        quality = score(self.gan, self.held_out, seed, self.config.extractor, self.config.scored)
        replace_text(self.run.quality, strict_json.dumps(quality, indent=2) + "\n")
        pictures.save_losses(self.run.read_metrics(), self.run.losses)
        report.write(self.config, self.run, self.gan, quality)
        print(report.summary(quality))


@contextmanager
def received_signals() -> Iterator[list[int]]:
    """Collect the first SIGINT or SIGTERM instead of exiting; a second one has its usual effect."""
    received: list[int] = []
    watched = (signal.SIGINT, signal.SIGTERM)

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)
        for watched_signal, handler in before.items():
            signal.signal(watched_signal, handler)

    if threading.current_thread() is not threading.main_thread():
        yield received  # Python delivers signals to the main thread only
        return
    before = {number: signal.signal(number, note) for number in watched}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
