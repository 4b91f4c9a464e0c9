"""Trains a GAN on few images with and without adaptive augmentation: does its discriminator memorize them?

    python benchmarks/ada.py --seeds 3

It trains on 500 of Noto's emoji at 32 px. Another 1000 are held out, and 1000 more give the floor of the KID. Results
are written to benchmarks/results/<device>/ada.json after every training run, so that the script can be stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from fastgan.bench.provenance import slug
from fastgan.trainer.config import ModelConfig, OptimConfig
from fastgan.trainer.data.emoji import find_emoji, read_emoji
from fastgan.trainer.data.held_out import sample_reals
from fastgan.trainer.data.sources import Images
from fastgan.trainer.device import choose_device, environment
from fastgan.trainer.game.augment import AugmentName
from fastgan.trainer.gan import GAN
from fastgan.trainer.measure.alarms import Watch
from fastgan.trainer.measure.diagnostics import Diagnostics
from fastgan.trainer.measure.extractors import Extractor, features_of, load_extractor
from fastgan.trainer.measure.metrics import kid, neighbors
from fastgan.trainer.measure.mode_collapse import spread
from fastgan.trainer.measure.quality import latents

IMAGES, JUDGED = 500, 1000
OBSERVED, SCORED = 25, 4  # steps between diagnostics; number of scores per training run
COURSE = ("step", "overfit", "d_real_sign", "d_real_accuracy", "diversity", "augment_p")  # kept fields of each record
MODEL = ModelConfig(architecture="dcgan", width=16, spectral_norm="none")
OPTIM = OptimConfig(
    loss="non-saturating",
    batch_size=32,
    d_lr=1e-3,
    g_lr=1e-3,
    betas=(0.0, 0.99),
    d_steps=4,
    ema_decay=0.99,
    ada_images=50_000,
)


class Emoji:
    """The images of one seed in three disjoint sets: for training, held out, and for the floor."""

    def __init__(self, pictures: Tensor, seed: int, device: torch.device) -> None:
        order = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(seed))
        self.seed = seed
        self.train, self.held_out, self.floor = (
            Images(pictures, 4 * seed + 2, device, members=order[first:last])
            for first, last in ((0, IMAGES), (IMAGES, IMAGES + JUDGED), (IMAGES + JUDGED, IMAGES + 2 * JUDGED))
        )

    def features(self, source: Images, extractor: Extractor) -> Tensor:
        return features_of(sample_reals(source, JUDGED, 0)[0].cpu(), extractor, source.device)


def play(emoji: Emoji, augment: AugmentName, steps: int, extractor: Extractor, real: Tensor) -> dict[str, Any]:
    """Train once. Return the alarms, the diagnostics, and scores against the features `real` during training."""
    device = emoji.train.device
    optim = dataclasses.replace(OPTIM, augment=augment)
    gan = GAN(MODEL, optim, emoji.train.fork(4 * emoji.seed + 2), 4 * emoji.seed, device)
    diagnostics, watch = Diagnostics(gan, emoji.held_out, emoji.seed), Watch()
    records: list[dict[str, Any]] = []
    alarms: list[dict[str, Any]] = []
    scores: list[dict[str, float]] = []
    training = 0.0
    for step in range(1, steps + 1):
        if step % OBSERVED == 0:
            diagnostics.before_step()
        started = time.perf_counter()
        losses = gan.step()
        training += time.perf_counter() - started
        if step % OBSERVED == 0:
            d_loss, g_loss = losses.tolist()
            records.append({"step": step, "d_loss": d_loss, "g_loss": g_loss} | diagnostics.observe(step))
            alarms += watch.look(records[-1])
        if step % (steps // SCORED) == 0:
            fake = torch.cat([gan.samples(z) for z in latents(gan, JUDGED, emoji.seed).split(optim.batch_size)])
            features = features_of(fake, extractor, device)
            scores.append({"step": step, "KID": kid(real, features), **neighbors(real, features)._asdict()})
            print(emoji.seed, augment, {k: round(v, 4) for k, v in scores[-1].items()}, flush=True)
    course = {key: [round(record.get(key, 0.0), 4) for record in records] for key in COURSE}
    about = {"seed": emoji.seed, "augment": augment, "steps": steps, "seconds": round(training, 1)}
    return {**about, "alarms": alarms, "scores": scores, "course": course}


def table(outcomes: list[dict[str, Any]]) -> str:
    """Format the last tenth of each run's diagnostics and its last scores, as mean ± standard error over the seeds."""
    lines = [
        "| augmentation | seeds | overfitting alarm at step | held-out gap | p | KID | best KID | coverage |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for kind in dict.fromkeys(outcome["augment"] for outcome in outcomes):
        group = [outcome for outcome in outcomes if outcome["augment"] == kind]
        rang = [next((a["step"] for a in o["alarms"] if a["alarm"] == "overfitting"), None) for o in group]
        last = {
            key: [statistics.median(o["course"][key][-max(1, len(o["course"]["step"]) // 10) :]) for o in group]
            for key in ("overfit", "augment_p")
        }
        kids = [[score["KID"] for score in o["scores"]] for o in group]
        lines.append(
            f"| {kind} | {len(group)} | {', '.join('never' if step is None else str(step) for step in rang)} "
            f"| {spread(last['overfit'], '.2f')} | {spread(last['augment_p'], '.2f')} "
            f"| {spread([k[-1] for k in kids], '.3f')} | {spread([min(k) for k in kids], '.3f')} "
            f"| {spread([o['scores'][-1]['coverage'] for o in group], '.2f')} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--augment", nargs="+", choices=get_args(AugmentName), default=["none", "ada"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1400)
    parser.add_argument("--extractor", default="random-conv")
    parser.add_argument("--data", type=Path, help="the font file, or its folder")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = choose_device(options.device)
    folder = options.out / slug(device)
    folder.mkdir(parents=True, exist_ok=True)
    pictures = read_emoji(find_emoji(options.data), 32)
    extractor = load_extractor(options.extractor, device)
    result: dict[str, Any] = {
        "environment": environment(device),
        "command": " ".join(["python", "benchmarks/ada.py", *sys.argv[1:]]),
        "images": IMAGES,
        "of": len(pictures),
        "extractor": options.extractor,
        "n": JUDGED,
        "model": vars(MODEL),
        "optim": vars(OPTIM),
        "floor": [],
        "outcomes": [],
    }
    for seed in range(options.seeds):
        emoji = Emoji(pictures, seed, device)
        real, other = (emoji.features(source, extractor) for source in (emoji.held_out, emoji.floor))
        result["floor"].append({"seed": seed, "KID": kid(real, other), **neighbors(real, other)._asdict()})
        for augment in options.augment:
            result["outcomes"].append(play(emoji, augment, options.steps, extractor, real))
            result["table"] = table(result["outcomes"]).splitlines()
            (folder / "ada.json").write_text(json.dumps(result) + "\n")
    floor = spread([floor["KID"] for floor in result["floor"]], ".4f")
    print(f"\n{options.steps} steps with batches of {OPTIM.batch_size}")
    print(f"KID of {JUDGED} samples with {options.extractor}, floor {floor}\n")
    print(table(result["outcomes"]))


if __name__ == "__main__":
    main()
