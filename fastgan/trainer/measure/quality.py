"""Scores of a generator, always reported with their N and floor."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastgan.trainer.config import TrainConfig
from fastgan.trainer.data.drawn import Source
from fastgan.trainer.data.held_out import sample_reals
from fastgan.trainer.data.sources import Mixture
from fastgan.trainer.data.toys import Stacked
from fastgan.trainer.gan import GAN
from fastgan.trainer.measure.classifier import stacked_modes
from fastgan.trainer.measure.extractors import (
    Extractor,
    check_extractor,
    digest,
    distance,
    features_of,
    label,
    load_extractor,
)
from fastgan.trainer.measure.metrics import count_modes, frechet_distance, kid, modes, neighbors

POINTS = 2500
LEAST = 10  # fewest images to compute distances from
DIVERGED = 10.0  # far above the cost of any completed training run, but finite, so that an optimizer can use it
STACKED = 10_000  # enough samples to find each of 1000 modes


def score(
    gan: GAN, held_out: Source | None, seed: int, extractor: str = "random-conv", images: int = 1000
) -> dict[str, Any]:
    """Return the scores of the averaged generator, or an empty dict if no metric fits the data.

    Points of a mixture: modes covered, fraction of high-quality samples, reverse KL. Stacked images: the same for the
    1000 modes of a classifier, which assigns every sample to a mode. Other images: KID, Frechet distance, density,
    coverage and recall of ``images`` samples (fewer if there are fewer reals) against held-out reals, with the floor of
    each, computed from training reals.
    """
    if isinstance(gan.source, Mixture):
        samples = gan.samples(latents(gan, POINTS, seed))
        return {"n": POINTS, **modes(samples, gan.source)._asdict()}
    if isinstance(gan.source, Stacked):
        samples = torch.cat([gan.samples(batch) for batch in latents(gan, STACKED, seed).split(gan.optim.batch_size)])
        return {"n": STACKED, **count_modes(stacked_modes(samples, gan.source), STACKED)._asdict()}
    if reason := why_unscored(gan.source, held_out):
        return {"unscored": reason}
    assert held_out is not None
    n = min(images, gan.source.size or images, held_out.size or images)
    real, labels = sample_reals(held_out, n, seed)
    other, _ = sample_reals(gan.source, n, seed)
    parts = [slice(start, start + gan.optim.batch_size) for start in range(0, n, gan.optim.batch_size)]
    z = latents(gan, n, seed)
    # Samples have the reals' classes, so that a rare class is as rare among them.
    fake = torch.cat([gan.samples(z[part], None if labels is None else labels[part]) for part in parts])
    real, other = real.cpu(), other.cpu()
    found = compare(real, other, fake, load_extractor(extractor, gan.device), extractor, gan.device)
    if n < images:
        held = "" if held_out.size is None or held_out.size > n else f" and {held_out.size} are held out"
        found["note"] = f"{images:,} samples were asked for{held}, so the scores compare {n:,}"
    return found


def why_unscored(source: Source, held_out: Source | None) -> str | None:
    """Return why samples of this data have no scores, or None."""
    if not measures_images(source.shape):
        return f"no score compares samples of shape {source.shape}"
    held = 0 if held_out is None else held_out.size
    if held is not None and held < LEAST:
        of = f", of {source.size + held} pictures" if source.size is not None else ""
        return (
            f"scores need at least {LEAST} held-out pictures, but this run holds out {held}{of}; with "
            f"{10 * LEAST} pictures or more, a tenth is held out"
        )
    return None


def measures_images(shape: tuple[int, ...]) -> bool:
    return len(shape) == 3 and shape[0] in (1, 3, 4)


def check_scoring(extractor: str, source: Source, device: torch.device) -> None:
    """Try the extractor that `score` would use. Reject a custom extractor that `score` would ignore.

    Raises:
        ValueError: the extractor does not work, or this data is not scored by features.
        ModuleNotFoundError: its weights are not installed.
    """
    if measures_images(source.shape) and not isinstance(source, Stacked):
        check_extractor(extractor, source.shape, device)
    elif extractor != TrainConfig.extractor:
        raise ValueError(
            f"extractor {extractor!r} needs images that are scored by features, but this data is not: leave it out"
        )


def compare(
    real: Tensor, other_real: Tensor | None, fake: Tensor, extractor: Extractor, name: str, device: torch.device
) -> dict[str, Any]:
    """Return scores of images `fake` against `real`, and their floor, computed from `other_real` instead of `fake`.

    All images are (N, C, H, W) in [-1, 1]. `extractor` may be any callable from images to features (N, F). `name` is
    what the user calls it. Without `other_real`, there is no floor.
    """
    sets = {"real": real, "fake": fake, "floor": other_real}
    features = {key: features_of(images, extractor, device) for key, images in sets.items() if images is not None}
    called = label(name)

    def against_real(key: str) -> dict[str, float]:
        pair = features["real"], features[key]
        return {f"KID-{called}": kid(*pair), distance(name): frechet_distance(*pair), **neighbors(*pair)._asdict()}

    about: dict[str, Any] = {"extractor": called} | ({"digest": found} if (found := digest(name)) else {})
    floor = {} if other_real is None else {"floor": against_real("floor")}
    return {**about, "n": len(fake), **against_real("fake"), **floor}


def latents(gan: GAN, count: int, seed: int) -> Tensor:
    return torch.randn(count, gan.latent_dim, generator=torch.Generator().manual_seed(seed), device="cpu")


def cost(scores: dict[str, Any]) -> float | None:
    """Return the cost of scores, which is lower for better samples, or None if there is no score.

    For images it is the KID. For points it is the fraction of missed modes, plus a tenth of the fraction of samples
    that are not of high quality.
    """
    if "covered" in scores:
        return float(1 - scores["covered"] / scores["total"] + 0.1 * (1 - scores["high_quality"]))
    for key, value in scores.items():
        if key.startswith("KID"):
            return min(float(value), DIVERGED) if math.isfinite(value) else DIVERGED
    return None
