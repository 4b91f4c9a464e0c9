"""Bayesian optimization of a preset's settings. The cost is the quality of the generator's samples, never a loss.

Workers are processes that share one journal file. If a worker is killed, only its current trial is lost, and that trial
is queued again. A stopped study continues when the same command runs again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from importlib import import_module
from multiprocessing import connection
from types import FrameType
from typing import Any

import optuna
import torch
from optuna.trial import FrozenTrial, Trial, TrialState

from fastgan import strict_json
from fastgan.trainer.config import TrainConfig
from fastgan.trainer.data.held_out import hold_out
from fastgan.trainer.data.sources import Mixture, load_source
from fastgan.trainer.data.toys import Stacked
from fastgan.trainer.device import choose_device
from fastgan.trainer.errors import TrainerError
from fastgan.trainer.gan import GAN
from fastgan.trainer.measure.quality import DIVERGED, LEAST, check_scoring, cost, measures_images, score
from fastgan.trainer.run import make_folder, replace_text
from fastgan.trainer.tune import report as tune_report
from fastgan.trainer.tune.config import TuneConfig
from fastgan.trainer.tune.journal import open_journal

RUNGS = 4  # evaluations of each training run, the last at its end; tpe can stop poor trials at the earlier ones
CHECK_EVERY = 50  # steps between checks for a loss that is not finite
NO_SCORE = "this preset cannot be tuned, because its samples have no score: use one with points or images"
FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)


def tune(config: TuneConfig) -> TrainConfig:
    """Run the study, and write best.json, trials.md and trials.png to its folder.

    Raises:
        TrainerError: all workers died, the folder cannot be written to or contains another study, or no trial could be
            scored.
        ValueError: the extractor does not work.
        ModuleNotFoundError: the sampler or the extractor needs a package that is missing.
    """
    check(config)
    make_folder(config.out)
    study = open_study(config)
    requeue_orphans(study)
    if not study.trials:
        study.enqueue_trial(values_of(config.start))  # so that the best result is at least as good as the preset
    if config.workers == 1:
        work(config, 0)
    else:
        with stopped_once() as stop:
            share(config, stop)
    if not any(trial.state == TrialState.COMPLETE for trial in study.trials):
        raise TrainerError(f"no trial of {config.out} finished")
    best = config.best(settings(config.start, study.best_params))
    replace_text(config.out / "best.json", strict_json.dumps(best.to_json(), indent=2) + "\n")
    tune_report.write(study, config.out)
    return best


def check(config: TuneConfig) -> None:
    """Raise errors that would make every trial or its score fail, before the first trial."""
    if config.sampler == "gp":
        import_module("scipy")  # optuna imports it only after the random trials
    start = config.start
    device = choose_device(start.device)
    source = load_source(start.dataset, 0, device, start.data, start.image_size, start.pictures)
    if not measures_images(source.shape) and not isinstance(source, Mixture):
        raise TrainerError(NO_SCORE)
    check_scoring(config.extractor, source, device)
    if isinstance(source, Mixture | Stacked):
        return
    largest = 2 * start.optim.batch_size  # largest batch size of any trial
    held_out = hold_out(source, largest, 0)
    if held_out is None or (held_out.size or LEAST) < LEAST:
        raise TrainerError(
            f"the data has too few images: trials use batches of up to {largest}, and scores need a held-out tenth of "
            f"at least {LEAST}"
        )


class Stop:
    """The first SIGTERM or Ctrl-C. It raises an exception, but later if it comes while a process starts.

    There, the exception could be lost in a callback of the interpreter, or leave a process that nobody knows.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self.later = False

    def receive(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:  # a further one would keep this process from stopping its workers
            self.signal = number
            self.check()

    def check(self) -> None:
        if self.signal is not None and not self.later:
            raise KeyboardInterrupt if self.signal == signal.SIGINT else SystemExit(128 + self.signal)


def share(config: TuneConfig, stop: Stop) -> None:
    """Run the workers until the study is done. If one is killed, queue its trial again and start another worker."""
    context = multiprocessing.get_context("spawn")  # CUDA does not work in a forked process, and OpenMP may not
    indices = iter(range(config.workers + config.trials))  # finite, in case every setting kills its worker

    workers: list[multiprocessing.process.BaseProcess] = []

    def start() -> None:
        workers.append(context.Process(target=work_apart, args=(config, next(indices))))
        stop.later = True
        with interrupts_ignored():
            workers[-1].start()
        stop.later = False
        stop.check()

    try:
        left = config.trials - len(open_study(config).get_trials(deepcopy=False, states=FINISHED))
        for _ in range(min(config.workers, left)):
            start()
        while workers:
            connection.wait([worker.sentinel for worker in workers], timeout=1)  # it does not see a signal just before
            stop.check()
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
    finally:  # if this process is interrupted, stop the workers; otherwise it would wait for them
        started = [worker for worker in workers if worker.pid is not None]
        for worker in started:
            worker.terminate()
        for worker in started:
            worker.join(10)
            worker.kill()  # if it still runs
            worker.join()
    requeue_orphans(open_study(config))  # a worker may have been killed before it registered its trial
    work(config, config.workers + config.trials)  # run the remaining trials; raises an error that ended every worker


@contextlib.contextmanager
def interrupts_ignored() -> Iterator[None]:
    """Make processes that start inside ignore Ctrl-C. A terminal sends it to all processes; their parent stops them."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python delivers signals to the main thread only
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def stopped_once() -> Iterator[Stop]:
    """Leave with an exception on SIGTERM and Ctrl-C. SIGTERM's default would end this process alone."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # Python delivers signals to the main thread only
        return
    before = {signal.SIGTERM: signal.getsignal(signal.SIGTERM)}
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # a shell's background job ignores Ctrl-C
        before[signal.SIGINT] = signal.getsignal(signal.SIGINT)
    for number in before:
        signal.signal(number, stop.receive)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def open_study(config: TuneConfig) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    journal = config.out / "journal.log"
    try:
        storage = optuna.storages.JournalStorage(open_journal(journal))
        study = optuna.create_study(study_name="tune", storage=storage, direction="minimize", load_if_exists=True)
    except (ValueError, KeyError, TypeError) as error:
        raise TrainerError(f"{journal} is not a study's journal, or is damaged: choose another --out") from error
    about = what_costs_depend_on(config)
    known = study.user_attrs.get("about", {})
    others = [f"{key} {known[key]}, not {value}" for key, value in about.items() if known.get(key, value) != value]
    if others:
        raise TrainerError(f"{config.out} contains a study with {', '.join(others)}: choose another --out")
    if about.keys() - known.keys():  # a new study, or an older version's
        study.set_user_attr("about", about)
    return study


def what_costs_depend_on(config: TuneConfig) -> dict[str, Any]:
    """Return the settings that all trials of a study share. Costs under other ones cannot be compared."""
    start = config.start
    data = {"data": str(start.data), "image_size": start.image_size, **dataclasses.asdict(start.pictures)}
    return {"preset": config.preset, "steps": start.steps, "seeds": config.seeds, "extractor": config.extractor} | data


def requeue_orphans(study: optuna.Study, workers: set[int | None] | None = None, killed: bool = False) -> None:
    """Mark the running trials of `workers` as failed and queue their settings again. None: of all dead processes.

    Settings whose worker was `killed` twice are dropped: they probably need too much memory. Stopping the whole command
    does not count as a kill.
    """
    for trial in study.get_trials(states=(TrialState.RUNNING,)):
        worker = trial.user_attrs.get("worker")
        if worker in workers if workers is not None else not alive(worker):
            study.tell(trial.number, state=TrialState.FAIL)
            if killed and trial.user_attrs.get("killed"):
                print(f"trial {trial.number} is dropped: its process died twice", flush=True)
            else:
                queue_again(study, trial, killed)


def queue_again(study: optuna.Study, trial: FrozenTrial, killed: bool = False) -> None:
    queued = trial.system_attrs.get("fixed_params", {})  # the trial may not have used all of them yet
    killed = killed or trial.user_attrs.get("killed", False)
    study.enqueue_trial(queued | trial.params, user_attrs={"killed": killed})


def alive(process: int | None) -> bool:
    try:
        os.kill(process or 0, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return process is not None


def done(config: TuneConfig, study: optuna.Study) -> bool:
    """Whether the finished and running trials are enough, and no trial of a dead process is waiting."""
    begun = study.get_trials(deepcopy=False, states=(*FINISHED, TrialState.RUNNING))
    return len(begun) >= config.trials and not study.get_trials(deepcopy=False, states=(TrialState.WAITING,))


def work_apart(config: TuneConfig, index: int) -> None:
    """Run trials in a process of their own, which SIGTERM ends at once."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    work(config, index)


def work(config: TuneConfig, index: int) -> None:
    """Run trials until the study is done."""
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
        except KeyboardInterrupt:  # optuna treats it as a failure of the trial
            queue_again(study, study.trials[trial.number])
            optuna.logging.set_verbosity(optuna.logging.ERROR)  # suppress optuna's warning with a traceback
            raise

    try:
        study.optimize(objective, callbacks=[enough])
    except AssertionError as error:  # by optuna, if it cannot write the end of a trial, such as on a full disk
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__context__
        if cause is None:
            raise
        raise OSError(cause.errno, cause.strerror, str(config.out / "journal.log")) from error


def strategy(config: TuneConfig, index: int) -> tuple[optuna.samplers.BaseSampler, optuna.pruners.BasePruner]:
    seed = 1000 * config.seed + index  # workers with equal seeds would try the same settings
    if config.sampler == "tpe":
        pruner = optuna.pruners.HyperbandPruner(min_resource=1, max_resource=RUNGS, reduction_factor=2)
        return optuna.samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True), pruner
    startup = max(4, config.trials // 3)
    return optuna.samplers.GPSampler(seed=seed, n_startup_trials=startup), optuna.pruners.NopPruner()


def values_of(config: TrainConfig) -> dict[str, Any]:
    """Return the point in the search space that corresponds to `config`."""
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
    """Sample the search space: within a factor of 10 of `start` for rates and weights, a factor of 2 for sizes."""
    center = values_of(start)
    values: dict[str, Any] = {}
    for name, value in center.items():
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
    """Return `start` with the settings of another point in the search space."""
    values = dict(values)
    betas = values.pop("beta1"), values.pop("beta2")
    of_model = {name: values.pop(name) for name in ("width", "n_power_iterations") if name in values}
    model = dataclasses.replace(start.model, **of_model)
    return dataclasses.replace(start, model=model, optim=dataclasses.replace(start.optim, betas=betas, **values))


def cost_of(config: TuneConfig, trial: Trial) -> float:
    """Train with the trial's settings for every seed, and return the mean cost."""
    trial.set_user_attr("worker", os.getpid())
    start = config.start
    chosen = settings(start, suggest(trial, start))
    games = [Game(chosen, seed, config.extractor) for seed in range(config.seeds)]
    for rung in range(1, RUNGS + 1):
        costs = [game.train_to(rung * chosen.steps // RUNGS) for game in games]
        cost = sum(costs) / len(costs)
        trial.report(cost, rung)
        if trial.should_prune():
            raise optuna.TrialPruned
    trial.set_user_attr("scores", [game.scores for game in games])
    return cost


class Game:
    """One training run of a trial. It has no run folder."""

    def __init__(self, config: TrainConfig, seed: int, extractor: str) -> None:
        device = choose_device(config.device)
        self.config, self.extractor, self.seed = config, extractor, seed
        source = load_source(config.dataset, 4 * seed + 2, device, config.data, config.image_size, config.pictures)
        self.held_out = hold_out(source, config.optim.batch_size, seed)
        self.gan = GAN(config.model, config.optim, source, 4 * seed, device)
        self.step, self.diverged = 0, False
        self.scores: dict[str, Any] = {}

    def train_to(self, step: int) -> float:
        """Train up to `step` and return the cost. A diverged run is not trained further."""
        while self.step < step and not self.diverged:
            losses = self.gan.step()
            self.step += 1
            if self.step % CHECK_EVERY == 0 or self.step == step:
                self.diverged = not bool(losses.isfinite().all())
        if self.diverged:
            return DIVERGED
        self.scores = score(self.gan, self.held_out, self.seed, self.extractor)
        found = cost(self.scores)
        if found is None:
            raise TrainerError(NO_SCORE)
        return found
