"""A table and a plot of a study."""

from __future__ import annotations

from pathlib import Path

import optuna
from matplotlib.figure import Figure
from optuna.trial import FrozenTrial, TrialState

from fastgan.trainer.run import replace_text


def line(trial: FrozenTrial) -> str:
    """Format one trial for the terminal."""
    cost = f"cost {trial.value:.4f}" if trial.value is not None else ""
    return f"trial {trial.number}: {trial.state.name.lower()} {cost}  " + "  ".join(
        f"{name} {_short(value)}" for name, value in trial.params.items()
    )


def write(study: optuna.Study, folder: Path) -> None:
    """Write trials.md, with the best trial first, and trials.png."""
    trials = [trial for trial in study.trials if trial.params]
    trials.sort(key=lambda trial: (trial.state != TrialState.COMPLETE, _cost(trial), trial.number))
    names = list(dict.fromkeys(name for trial in trials for name in trial.params))
    rows = [["trial", "state", "cost", *names], ["---"] * (3 + len(names))]
    for trial in trials:
        cost = "" if trial.value is None else f"{trial.value:.4f}"
        settings = [_short(trial.params.get(name, "")) for name in names]
        rows.append([str(trial.number), trial.state.name.lower(), cost, *settings])
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    replace_text(folder / "trials.md", f"{table}\n\n![trials](trials.png)\n")
    plot([trial for trial in trials if trial.state == TrialState.COMPLETE], names, folder / "trials.png")


def plot(trials: list[FrozenTrial], names: list[str], path: Path) -> None:
    """Plot the costs over the course of the study, and over each setting."""
    columns = 3
    rows = -(-(1 + len(names)) // columns)
    figure = Figure(figsize=(4 * columns, 3 * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    course = sorted(trials, key=lambda trial: trial.number)
    costs = [_cost(trial) for trial in course]
    axes[0].plot([trial.number for trial in course], costs, "o", markersize=4, label="trial")
    best = [min(costs[: index + 1]) for index in range(len(costs))]
    axes[0].step([trial.number for trial in course], best, where="post", label="best so far")
    axes[0].set(xlabel="trial", ylabel="cost")
    axes[0].legend()
    for panel, name in zip(axes[1:], names, strict=False):
        points = [(trial.params[name], _cost(trial)) for trial in course if name in trial.params]
        panel.plot(*zip(*points, strict=True), "o", markersize=4)
        panel.set(xlabel=name, ylabel="cost")
        if name in ("d_lr", "g_lr", "penalty_weight"):
            panel.set_xscale("log")
    for panel in axes[1 + len(names) :]:
        panel.set_visible(False)
    figure.savefig(path, dpi=110)


def _cost(trial: FrozenTrial) -> float:
    return float("inf") if trial.value is None else trial.value


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
