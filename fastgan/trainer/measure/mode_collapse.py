"""Do batch statistics prevent mode collapse? PacGAN's experiment on 8 and on 25 Gaussians.

The setup follows Lin et al. 2018, who follow VEEGAN (Srivastava et al. 2017). Generator: z ~ N(0, I2), four layers of
400 units with batch norm and ReLU. Discriminator: three layers of 200 maxout units of five pieces. Adam, learning rate
1e-4, beta1 0.8, batches of 100. The discriminator minimizes softplus(-D(x)) + softplus(D(G(z))), the generator
softplus(-D(G(z))). Of 2500 samples, those within 3 sigma of the nearest mode are of high quality. A mode is found if it
is nearest to a high-quality sample. Reverse KL compares the fractions of samples nearest to each mode with uniform.

The experiment also runs on the trainer's presets. They use spectral norm, and so does every variant except "none", the
plain GAN. They judge pairs of samples, as only the variant "pack2" does: that variant is the preset itself.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from fastgan.trainer.config import PRESETS, ModelConfig, OptimConfig
from fastgan.trainer.data.sources import Mixture, load_source
from fastgan.trainer.gan import GAN
from fastgan.trainer.measure.quality import latents

Variant = Literal["none", "spectral-norm", "stddev", "discrimination", "pack2"]
Toy = Literal["ring8", "grid25"]
Protocol = Literal["pacgan", "preset"]

SAMPLES = 2500
OPTIM = OptimConfig(loss="non-saturating", batch_size=100, d_lr=1e-4, g_lr=1e-4, betas=(0.8, 0.999), ema_decay=0.0)
# Modes found, mean of ten trainings, for GAN and PacGAN2: PacGAN's tables for the 2-D ring and the 2-D grid.
PUBLISHED: dict[tuple[str, str], float] = {
    ("ring8", "none"): 6.3,
    ("ring8", "pack2"): 7.9,
    ("grid25", "none"): 17.3,
    ("grid25", "pack2"): 23.8,
}


@dataclass(frozen=True)
class Outcome:
    """The result of one training."""

    dataset: Toy
    variant: Variant
    seed: int
    steps: int
    modes: int  # modes with a high-quality sample
    high_quality: float  # fraction of the samples
    reverse_kl: float  # KL(generated || uniform) over the modes, in nats
    seconds: float
    protocol: Protocol = "pacgan"


def judge(samples: Tensor, source: Mixture) -> tuple[int, float, float]:
    """Return the number of modes found, the fraction of high-quality samples and the reverse KL of samples (N, 2)."""
    distance, nearest = torch.cdist(samples.double(), source.modes.double()).min(1)  # (N,)
    good = distance <= 3 * source.sigma
    shares = nearest.bincount(minlength=len(source.modes)) / len(samples)
    divergence = sum(share * math.log(share * len(source.modes)) for share in shares.tolist() if share)
    return len(nearest[good].unique()), float(good.double().mean()), divergence


def settings(dataset: Toy, variant: Variant, protocol: Protocol) -> tuple[ModelConfig, OptimConfig]:
    if protocol == "pacgan":
        model, optim = ModelConfig(architecture="pacgan", latent_dim=2, spectral_norm="none"), OPTIM
    else:
        model, optim = replace(PRESETS[dataset][1].model, pack=1), PRESETS[dataset][1].optim
    if variant == "none":
        return replace(model, spectral_norm="none"), optim
    if variant == "spectral-norm":
        return replace(model, spectral_norm="fused"), optim
    if variant == "pack2":
        return replace(model, pack=2), optim
    return replace(model, minibatch=variant), optim


def play(
    dataset: Toy, variant: Variant, seed: int, steps: int, device: torch.device, protocol: Protocol = "pacgan"
) -> Outcome:
    """Train one GAN and judge its averaged generator, with batch norm in evaluation mode."""
    model, optim = settings(dataset, variant, protocol)
    source = load_source(dataset, 4 * seed + 2, device)
    assert isinstance(source, Mixture)
    gan = GAN(model, optim, source, 4 * seed, device)
    started = time.monotonic()
    for _ in range(steps):
        gan.step()
    seconds = time.monotonic() - started
    modes, high_quality, reverse_kl = judge(gan.samples(latents(gan, SAMPLES, 4 * seed + 3)), source)
    return Outcome(dataset, variant, seed, steps, modes, high_quality, reverse_kl, seconds, protocol)


def experiment(
    datasets: Iterable[Toy],
    variants: Iterable[Variant],
    seeds: int,
    steps: int | None,
    device: torch.device,
    protocol: Protocol = "pacgan",
) -> Iterator[Outcome]:
    """Run every variant on every data set with every seed, and yield outcomes as they finish.

    Seeds are the outermost loop, so that a partial result is useful. ``steps`` None uses the preset's number.
    """
    variants = list(variants)
    datasets = list(datasets)
    for seed in range(seeds):
        for dataset in datasets:
            for variant in variants:
                yield play(dataset, variant, seed, steps or PRESETS[dataset][1].steps, device, protocol)


def table(outcomes: Iterable[Outcome]) -> str:
    """Format means and standard errors over the seeds as a Markdown table, with PacGAN's published modes."""
    groups: dict[tuple[str, str], list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault((outcome.dataset, outcome.variant), []).append(outcome)
    lines = [
        "| data | variant | seeds | steps | seconds | modes | high quality | reverse KL | modes, PacGAN's paper |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (dataset, variant), group in sorted(groups.items()):
        modes = spread([o.modes for o in group], ".1f")
        quality = spread([100 * o.high_quality for o in group], ".1f")
        divergence = spread([o.reverse_kl for o in group], ".2f")
        published = PUBLISHED.get((dataset, variant)) if group[0].protocol == "pacgan" else None
        steps = "/".join(str(n) for n in sorted({o.steps for o in group}))
        seconds = statistics.fmean(o.seconds for o in group)
        lines.append(
            f"| {dataset} | {variant} | {len(group)} | {steps} | {seconds:.0f} | {modes} | {quality} % | {divergence} "
            f"| {'' if published is None else published} |"
        )
    return "\n".join(lines)


def spread(values: list[float] | list[int], style: str) -> str:
    """Format the mean ± its standard error, or only the mean for a single value."""
    mean = format(statistics.fmean(values), style)
    if len(values) < 2:
        return mean
    return f"{mean} ± {format(statistics.stdev(values) / math.sqrt(len(values)), style)}"


def to_json(outcomes: Iterable[Outcome]) -> list[dict[str, object]]:
    return [asdict(outcome) for outcome in outcomes]
