"""Runs `fastgan tune` with two workers, kills one of them, and compares the best settings with the preset's.

    python benchmarks/tune.py --trials 12 --steps 3000 --fresh-seeds 8

The sweep uses two seeds per setting, so its best result is biased by selection. This script trains the best settings
and the preset again with seeds that the sweep did not use. Results are written to
benchmarks/results/<device>/tune-<preset>.json, the study to --study.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import signal
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

from fastgan.bench.provenance import slug
from fastgan.trainer.config import PRESETS, TrainConfig
from fastgan.trainer.device import choose_device, environment
from fastgan.trainer.measure.mode_collapse import spread
from fastgan.trainer.tune.study import FINISHED, Game, TuneConfig, open_study, tune

FIRST_FRESH_SEED = 1000


def kill_one(config: TuneConfig, after: int, killed: list[int]) -> None:
    """Kill one worker after `after` trials have finished, as the kernel does when memory runs out."""
    study = open_study(config)
    while len(study.get_trials(deepcopy=False, states=FINISHED)) < after:
        time.sleep(1)
    worker = multiprocessing.active_children()[0]
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)
    killed.append(worker.pid)


def judge(config: TrainConfig, seeds: range) -> list[dict[str, Any]]:
    """Train with each seed, and return the scores."""
    found = []
    for seed in seeds:
        game = Game(config, seed, "random-conv")
        cost = game.train_to(config.steps)
        found.append({"seed": seed, "cost": cost, **game.scores})
        print(found[-1], flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=list(PRESETS), default="grid25")
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--fresh-seeds", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads for the training runs with fresh seeds")
    parser.add_argument("--study", type=Path, default=Path("runs/tune-benchmark"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    device = choose_device("cpu")
    where = environment(device)
    config = TuneConfig(
        options.preset, trials=options.trials, workers=2, steps=options.steps, device="cpu", out=options.study
    )
    options.study.mkdir(parents=True, exist_ok=True)
    killed: list[int] = []
    threading.Thread(target=kill_one, args=(config, options.trials // 3, killed), daemon=True).start()
    started = time.monotonic()
    best = tune(config)
    seconds = time.monotonic() - started

    torch.set_num_threads(options.threads)
    seeds = range(FIRST_FRESH_SEED, FIRST_FRESH_SEED + options.fresh_seeds)
    fresh = {"preset": judge(config.start, seeds), "best": judge(dataclasses.replace(best, steps=options.steps), seeds)}
    study = open_study(config)
    trials = [
        {
            "number": trial.number,
            "state": trial.state.name,
            "cost": trial.value,
            "worker": trial.user_attrs.get("worker"),
            "settings": trial.params,
        }
        for trial in study.trials
    ]
    result = {
        "environment": where,
        "command": " ".join(["python", "benchmarks/tune.py", *sys.argv[1:]]),
        "steps": options.steps,
        "seconds_of_the_sweep": seconds,
        "killed_workers": killed,
        "trials": trials,
        "best": study.best_params,
        "fresh": fresh,
    }
    folder = options.out / slug(device)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"tune-{options.preset}.json").write_text(json.dumps(result, indent=1) + "\n")

    print(f"\n{len(study.trials)} trials, worker {killed} killed; seeds {seeds[0]} to {seeds[-1]}\n")
    print("| settings | cost | modes | high quality | reverse KL |\n|---|---|---|---|---|")
    for name, outcomes in fresh.items():
        cost = spread([o["cost"] for o in outcomes], ".3f")
        found = [statistics.fmean(o[key] for o in outcomes) for key in ("covered", "high_quality", "reverse_kl")]
        print(f"| {name} | {cost} | {found[0]:.1f} | {100 * found[1]:.1f} % | {found[2]:.3f} |")


if __name__ == "__main__":
    main()
