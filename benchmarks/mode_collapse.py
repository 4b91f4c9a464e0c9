"""Modes that a GAN finds with and without statistics over its batch, beside PacGAN's published numbers.

    python benchmarks/mode_collapse.py --steps 25000 --seeds 3

The paper trained for 400 epochs of 100,000 samples, 400,000 steps of 100; ``--steps`` shortens that, and the table says
to what. Results go to benchmarks/results/<device>/, after every training, so that a run may be stopped.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import get_args

import torch

from fastgan.bench.provenance import slug
from fastgan.trainer.device import choose_device, environment
from fastgan.trainer.mode_collapse import Toy, Variant, experiment, table, to_json

PAPER_STEPS = 400_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--datasets", nargs="+", choices=get_args(Toy), default=get_args(Toy))
    parser.add_argument("--variants", nargs="+", choices=get_args(Variant), default=get_args(Variant))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=25_000)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; networks this small gain nothing by more")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = choose_device(options.device)
    where = environment(device)
    folder = options.out / slug(device)
    folder.mkdir(parents=True, exist_ok=True)
    outcomes = []
    for outcome in experiment(options.datasets, options.variants, options.seeds, options.steps, device):
        outcomes.append(outcome)
        result = {"environment": where, "steps_of_the_paper": PAPER_STEPS, "outcomes": to_json(outcomes)}
        (folder / "mode-collapse.json").write_text(json.dumps(result, indent=1) + "\n")
        print(outcome, flush=True)
    print(f"\n{options.steps:,} steps where the paper took {PAPER_STEPS:,}; mean ± standard error over the seeds\n")
    print(table(outcomes))


if __name__ == "__main__":
    main()
