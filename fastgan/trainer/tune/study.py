"""Bayesian optimization of a preset's settings, judged by what the generator makes and never by a loss.

Workers are processes that share one journal file. A worker that is killed costs no more than the time of the trial that
it was in, which is queued again; a study that was stopped goes on when the same command is given again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from importlib import import_module
from multiprocessing import connection
from typing import Any

import optuna
import torch
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState

from fastgan import strict_json
from fastgan.trainer.config import TrainConfig
from fastgan.trainer.data.held_out import hold_out
from fastgan.trainer.data.sources import Mixture, load_source
from fastgan.trainer.data.toys import Stacked
from fastgan.trainer.device import choose_device
from fastgan.trainer.errors import TrainerError
from fastgan.trainer.gan import GAN
from fastgan.trainer.measure.quality import LEAST, check_scoring, measures_images, score
from fastgan.trainer.run import make_folder
from fastgan.trainer.tune import report as tune_report
from fastgan.trainer.tune.config import TuneConfig

RUNGS = 4  # times that a training is judged, the last at its end; tpe stops the unpromising earlier
CHECK_EVERY = 50  # steps between looks for a loss that is not finite
DIVERGED = 10.0  # far above the cost of any training that ends, and finite: the optimizer learns from it too
NO_SCORE = "this preset has no score to tune by: wanted points of a mixture or images"
FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)


def tune(config: TuneConfig) -> TrainConfig:
    """Run the study, and leave best.json, trials.md and trials.png in its folder.

    Raises:
        TrainerError: all workers died, the folder cannot be written to or holds the study of something else, or no
            trial could be scored.
        ValueError: the extractor does not work.
        ModuleNotFoundError: a package is missing that the sampler or the extractor needs.
    """
    check(config)
    make_folder(config.out)
    study = open_study(config)
    requeue_orphans(study)
    if not study.trials:
        study.enqueue_trial(values_of(config.start))  # the best found is then no worse than the preset
    if config.workers == 1:
        work(config, 0)
    else:
        share(config)
    if not any(trial.state == TrialState.COMPLETE for trial in study.trials):
        raise TrainerError(f"no trial of {config.out} finished")
    best = settings(config.start, study.best_params)
    (config.out / "best.json").write_text(strict_json.dumps(best.to_json(), indent=2) + "\n")
    tune_report.write(study, config.out)
    return best


def check(config: TuneConfig) -> None:
    """Raise what every trial would fail of, or its score, before there is one."""
    if config.sampler == "gp":
        import_module("scipy")  # which optuna asks for only after the trials that are drawn at random
    start = config.start
    device = choose_device(start.device)
    source = load_source(start.dataset, 0, device, start.data, start.image_size)
    if not measures_images(source.shape) and not isinstance(source, Mixture):
        raise TrainerError(NO_SCORE)
    check_scoring(config.extractor, source, device)
    if isinstance(source, Mixture | Stacked):
        return
    largest = 2 * start.optim.batch_size  # that a trial may ask for
    held_out = hold_out(source, largest, 0)
    if held_out is None or (held_out.size or LEAST) < LEAST:
        raise TrainerError(
            f"the data has too few images: trials take batches of up to {largest}, and scores hold out a tenth, "
            f"at least {LEAST}"
        )


def share(config: TuneConfig) -> None:
    """Run the workers until the study is done; the trial of one that is killed is queued again, and another starts."""
    context = multiprocessing.get_context("spawn")  # a forked process has no CUDA and may have no OpenMP
    indices = iter(range(config.workers + config.trials))  # should every setting kill, it ends

    workers: list[multiprocessing.process.BaseProcess] = []

    def start() -> None:
        worker = context.Process(target=work, args=(config, next(indices)))
        with interrupts_ignored():
            worker.start()
        workers.append(worker)

    try:
        for _ in range(config.workers):
            start()
        while workers:
            connection.wait([worker.sentinel for worker in workers])
            for worker in [worker for worker in workers if not worker.is_alive()]:
                workers.remove(worker)
                if not worker.exitcode:
                    continue
                print(f"worker {worker.pid} ended with {worker.exitcode}; its trial is queued again", flush=True)
                study = open_study(config)
                requeue_orphans(study, {worker.pid}, killed=worker.exitcode < 0)
                if worker.exitcode < 0 and not done(config, study) and len(workers) < config.workers:
                    with contextlib.suppress(StopIteration):
                        start()
    finally:  # should this process be interrupted: it would wait for them before it ends
        for worker in workers:
            worker.terminate()
        for worker in workers:
            worker.join()
    requeue_orphans(open_study(config))  # should one have been killed before it signed its trial
    work(config, config.workers + config.trials)  # what is left over; an error that ends every worker shows here


@contextlib.contextmanager
def interrupts_ignored() -> Iterator[None]:
    """A process that starts inside ignores Ctrl-C, which a terminal sends to all of them: their parent ends them."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python delivers signals to the main thread only
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def open_study(config: TuneConfig) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(config.out / "journal.log")))
    study = optuna.create_study(study_name="tune", storage=storage, direction="minimize", load_if_exists=True)
    about = {"preset": config.preset, "steps": config.start.steps, "seeds": config.seeds}
    known = study.user_attrs.get("about", about)
    if known != about:
        raise TrainerError(f"{config.out} holds a study of {known}, not of {about}: choose another --out")
    if "about" not in study.user_attrs:
        study.set_user_attr("about", about)
    return study


def requeue_orphans(study: optuna.Study, workers: set[int | None] | None = None, killed: bool = False) -> None:
    """Fail the running trials of `workers` (None: of processes that are gone), and queue their settings again.

    Settings that had their worker `killed` twice are given up: it may well be they that kill it, by all the memory they
    take. A stop of the whole command says nothing of them.
    """
    for trial in study.get_trials(states=(TrialState.RUNNING,)):
        worker = trial.user_attrs.get("worker")
        if worker in workers if workers is not None else not alive(worker):
            study.tell(trial.number, state=TrialState.FAIL)
            if killed and trial.user_attrs.get("killed"):
                print(f"trial {trial.number} is given up: its process died twice", flush=True)
            else:
                queue_again(study, trial, killed)


def queue_again(study: optuna.Study, trial: FrozenTrial, killed: bool = False) -> None:
    queued = trial.system_attrs.get("fixed_params", {})  # not all of them may have been taken yet
    killed = killed or trial.user_attrs.get("killed", False)
    study.enqueue_trial(queued | trial.params, user_attrs={"killed": killed})


def alive(process: int | None) -> bool:
    try:
        os.kill(process or 0, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return process is not None


def done(config: TuneConfig, study: optuna.Study) -> bool:
    """Whether there are trials enough, and none is queued that a dead process has left."""
    finished = study.get_trials(deepcopy=False, states=FINISHED)
    return len(finished) >= config.trials and not study.get_trials(deepcopy=False, states=(TrialState.WAITING,))


def work(config: TuneConfig, index: int) -> None:
    """Take trials until the study is done."""
    study = open_study(config)
    if done(config, study):
        return
    if config.workers > 1:
        torch.set_num_threads(max(1, torch.get_num_threads() // config.workers))
    study.sampler, study.pruner = strategy(config, index)

    def enough(study: optuna.Study, trial: FrozenTrial) -> None:
        print(tune_report.line(trial), flush=True)
        if done(config, study):
            study.stop()

    def objective(trial: Trial) -> float:
        try:
            return cost_of(config, trial)
        except KeyboardInterrupt:  # which optuna takes for the trial's failure
            queue_again(study, study.trials[trial.number])
            optuna.logging.set_verbosity(optuna.logging.ERROR)  # it would warn with a traceback
            raise

    study.optimize(objective, callbacks=[enough])


def strategy(config: TuneConfig, index: int) -> tuple[optuna.samplers.BaseSampler, optuna.pruners.BasePruner]:
    seed = 1000 * config.seed + index  # workers of one seed would try the same settings
    if config.sampler == "tpe":
        pruner = optuna.pruners.HyperbandPruner(min_resource=1, max_resource=RUNGS, reduction_factor=2)
        return optuna.samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True), pruner
    startup = max(4, config.trials // 3)
    return optuna.samplers.GPSampler(seed=seed, n_startup_trials=startup), optuna.pruners.NopPruner()


def values_of(config: TrainConfig) -> dict[str, Any]:
    """The point of the search space where `config` stands."""
    model, optim = config.model, config.optim
    values = {
        "d_lr": optim.d_lr,
        "g_lr": optim.g_lr,
        "beta1": optim.betas[0],
        "beta2": optim.betas[1],
        "batch_size": optim.batch_size,
        "width": model.width,
    }
    if optim.penalty != "none":
        values["penalty_weight"] = optim.penalty_weight
    if model.spectral_norm != "none":
        values["n_power_iterations"] = model.n_power_iterations
    return values


def suggest(trial: Trial, start: TrainConfig) -> dict[str, Any]:
    """A point of the search space: a decade to each side of `start` for rates and weights, a factor of 2 for sizes."""
    centre = values_of(start)
    values: dict[str, Any] = {}
    for name, value in centre.items():
        if name in ("d_lr", "g_lr", "penalty_weight"):
            values[name] = trial.suggest_float(name, value / 10, value * 10, log=True)
        elif name == "beta1":
            values[name] = trial.suggest_float(name, 0.0, 0.9)
        elif name == "beta2":
            values[name] = trial.suggest_float(name, 0.9, 0.9999)
        elif name == "n_power_iterations":
            values[name] = trial.suggest_int(name, 1, 3)
        else:
            values[name] = trial.suggest_categorical(name, [value // 2, value, value * 2])
    return values


def settings(start: TrainConfig, values: dict[str, Any]) -> TrainConfig:
    """`start` at another point of the search space."""
    values = dict(values)
    betas = values.pop("beta1"), values.pop("beta2")
    of_model = {name: values.pop(name) for name in ("width", "n_power_iterations") if name in values}
    model = dataclasses.replace(start.model, **of_model)
    return dataclasses.replace(start, model=model, optim=dataclasses.replace(start.optim, betas=betas, **values))


def cost_of(config: TuneConfig, trial: Trial) -> float:
    """The mean cost of the trial's settings over the seeds, after training each to the end."""
    trial.set_user_attr("worker", os.getpid())
    start = config.start
    chosen = settings(start, suggest(trial, start))
    games = [Game(chosen, seed, config.extractor) for seed in range(config.seeds)]
    for rung in range(1, RUNGS + 1):
        costs = [game.play_to(rung * chosen.steps // RUNGS) for game in games]
        cost = sum(costs) / len(costs)
        trial.report(cost, rung)
        if trial.should_prune():
            raise optuna.TrialPruned
    trial.set_user_attr("scores", [game.scores for game in games])
    return cost


class Game:
    """One training of a trial, without a folder."""

    def __init__(self, config: TrainConfig, seed: int, extractor: str) -> None:
        device = choose_device(config.device)
        self.config, self.extractor, self.seed = config, extractor, seed
        source = load_source(config.dataset, 4 * seed + 2, device, config.data, config.image_size)
        self.held_out = hold_out(source, config.optim.batch_size, seed)
        self.gan = GAN(config.model, config.optim, source, 4 * seed, device)
        self.step, self.diverged = 0, False
        self.scores: dict[str, Any] = {}

    def play_to(self, step: int) -> float:
        """The cost after `step` steps; a game that has diverged is not played on."""
        while self.step < step and not self.diverged:
            losses = self.gan.step()
            self.step += 1
            if self.step % CHECK_EVERY == 0 or self.step == step:
                self.diverged = not bool(losses.isfinite().all())
        if self.diverged:
            return DIVERGED
        self.scores = score(self.gan, self.held_out, self.seed, self.extractor)
        return cost(self.scores)


def cost(scores: dict[str, Any]) -> float:
    """Of points: the share of modes missed, plus a tenth of the share of poor samples. Of images: the KID.

    Raises:
        TrainerError: nothing here scores such data.
    """
    if "covered" in scores:
        return float(1 - scores["covered"] / scores["total"] + 0.1 * (1 - scores["high_quality"]))
    for key, value in scores.items():
        if key.startswith("KID"):
            return min(float(value), DIVERGED) if math.isfinite(value) else DIVERGED
    raise TrainerError(NO_SCORE)
