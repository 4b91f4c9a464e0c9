"""Counts the modes that a GAN finds with and without batch statistics, and compares with PacGAN's paper.

    python benchmarks/mode_collapse.py --steps 25000 --seeds 3
    python benchmarks/mode_collapse.py --protocol preset

The paper trained for 400 epochs of 100,000 samples, which is 400,000 steps of 100. ``--steps`` shortens that, and the
table shows the number. The second command runs the trainer's presets, with their own numbers of steps. Results are
written to benchmarks/results/<device>/ after every training run, so that the script can be stopped.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import get_args

import torch

from fastgan.bench.provenance import slug
from fastgan.trainer.device import choose_device, environment
from fastgan.trainer.measure.mode_collapse import Protocol, Toy, Variant, experiment, table, to_json

PAPER_STEPS = 400_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--datasets", nargs="+", choices=get_args(Toy), default=get_args(Toy))
    parser.add_argument("--variants", nargs="+", choices=get_args(Variant), default=get_args(Variant))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--protocol", choices=get_args(Protocol), default="pacgan")
    parser.add_argument("--steps", type=int, help="default: 25,000 for pacgan, otherwise the preset's")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; more do not speed up such small networks")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = choose_device(options.device)
    where = environment(device)
    folder = options.out / slug(device)
    folder.mkdir(parents=True, exist_ok=True)
    command = " ".join(["python", "benchmarks/mode_collapse.py", *sys.argv[1:]])
    steps = options.steps or (25_000 if options.protocol == "pacgan" else None)
    outcomes = []
    for outcome in experiment(options.datasets, options.variants, options.seeds, steps, device, options.protocol):
        outcomes.append(outcome)
        result = {
            "environment": where,
            "command": command,
            "table": table(outcomes).splitlines(),
            "outcomes": to_json(outcomes),
        }
        (folder / f"mode-collapse-{options.protocol}.json").write_text(json.dumps(result, indent=1) + "\n")
        print(outcome, flush=True)
    if options.protocol == "pacgan":
        print(f"\n{steps:,} steps (the paper used {PAPER_STEPS:,}); mean ± standard error over the seeds\n")
    print(table(outcomes))


if __name__ == "__main__":
    main()
