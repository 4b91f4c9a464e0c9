"""Images per second of the whole training step, with fastgan and with plain PyTorch, alternately in one process.

    python benchmarks/trainer.py --turns 7

The PyTorch variant computes the same: spectral norm with its parametrization, penalties with its double backward,
minibatch statistics with the reference. Results are written to benchmarks/results/<device>/trainer.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from fastgan.bench.heap import keep_freed_memory
from fastgan.bench.provenance import slug
from fastgan.trainer.config import CRITIC, PRESETS, R3GAN, RESIDUAL, WGAN_GP, ModelConfig, OptimConfig
from fastgan.trainer.data.sources import load_source
from fastgan.trainer.device import choose_device, environment
from fastgan.trainer.gan import GAN

DCGAN, DCGAN_OPTIM = PRESETS["discs"][1].model, PRESETS["discs"][1].optim
GAMES: dict[str, tuple[str, ModelConfig, OptimConfig]] = {
    "DCGAN, spectral norm": ("discs", DCGAN, DCGAN_OPTIM),
    "DCGAN, spectral norm, R1": ("discs", DCGAN, dataclasses.replace(DCGAN_OPTIM, penalty="r1")),
    "DCGAN, WGAN-GP, 5 D steps": ("discs", CRITIC, WGAN_GP),
    "residual, R1": ("discs", RESIDUAL, dataclasses.replace(R3GAN, penalty="r1")),
    "residual, relativistic, R1 + R2": ("discs", RESIDUAL, R3GAN),
    "residual, stddev, R1 + R2": ("discs", dataclasses.replace(RESIDUAL, minibatch="stddev"), R3GAN),
    "voxels, WGAN-GP, 5 D steps": ("voxels", CRITIC, WGAN_GP),
}


def build(name: str, kernels: str, device: torch.device) -> GAN:
    dataset, model, optim = GAMES[name]
    if model.spectral_norm != "none":
        model = dataclasses.replace(model, spectral_norm="fused" if kernels == "fastgan" else "torch")
    optim = dataclasses.replace(optim, kernels=kernels)  # type: ignore[arg-type]
    return GAN(model, optim, load_source(dataset, 2, device), 0, device)  # type: ignore[arg-type]


def compare(name: str, turns: int, device: torch.device) -> dict[str, Any]:
    games = {kernels: build(name, kernels, device) for kernels in ("fastgan", "torch")}
    times: dict[str, list[float]] = {kernels: [] for kernels in games}
    for turn in range(-1, turns):  # the first turn is a warm-up
        for kernels, gan in games.items():
            started = time.perf_counter()
            gan.step()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if turn >= 0:
                times[kernels].append(time.perf_counter() - started)
    optim = GAMES[name][2]
    rate = {k: optim.d_steps * optim.batch_size / statistics.median(values) for k, values in times.items()}
    return {"game": name, "images_per_s": rate, "ratio": rate["fastgan"] / rate["torch"], "seconds": times}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--games", nargs="+", choices=list(GAMES), default=list(GAMES))
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    device = choose_device(options.device)
    keep_freed_memory()  # like `fastgan train`
    results = []
    for name in options.games:
        results.append(compare(name, options.turns, device))
        rate = results[-1]["images_per_s"]
        print(
            f"{name:34} fastgan {rate['fastgan']:7.0f}  PyTorch {rate['torch']:7.0f} real images/s"
            f"  {results[-1]['ratio']:.2f}x",
            flush=True,
        )
    folder = options.out / slug(device)
    folder.mkdir(parents=True, exist_ok=True)
    result = {"environment": environment(device), "turns": options.turns, "results": results}
    (folder / "trainer.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
