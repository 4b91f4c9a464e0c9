"""Quality of samples: by the modes of a known mixture, or by comparing image features with those of reals.

Feature metrics compare two finite sets. Each is reported with its N and its floor: the same metric between two disjoint
sets of reals. No generator is expected to go below the floor.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastgan.trainer.data.sources import Mixture

NEIGHBORS = 5  # k of density, coverage and recall, as in their papers
SUBSET = 100  # samples in one KID estimate
SUBSETS = 50
ROWS = 2048  # reals that are compared with all fakes at once


class Modes(NamedTuple):
    covered: int  # modes with at least one high-quality sample
    total: int
    high_quality: float  # fraction of the samples within 3 sigma of a mode
    reverse_kl: float  # KL(fraction of samples in each mode || uniform) in nats; inf without high-quality samples


def modes(samples: Tensor, source: Mixture) -> Modes:
    """Score points (N, 2) against the mixture that they should follow.

    A sample within 3 sigma of a mode is of high quality and belongs to that mode, as in Srivastava et al. 2017 and Lin
    et al. 2018 (PacGAN).
    """
    distance = torch.cdist(samples.cpu(), source.modes)  # (N, K)
    nearest, mode = distance.min(1)
    counts = torch.bincount(mode[nearest <= 3 * source.sigma], minlength=len(source.modes))
    return count_modes(counts, len(samples))


def count_modes(counts: Tensor, samples: int) -> Modes:
    """Score `samples` of which `counts` (K,) fell into each mode. A classifier's classes also count as modes."""
    total = int(counts.sum())
    share = counts.double() / max(total, 1)
    present = share[share > 0]
    reverse_kl = float((present * (present * len(counts)).log()).sum()) if total else math.inf
    return Modes(int((counts > 0).sum()), len(counts), total / samples, reverse_kl)


def kid(real: Tensor, fake: Tensor, *, subsets: int = SUBSETS, size: int = SUBSET, seed: int = 0) -> float:
    """Kernel inception distance of features (N, F) and (M, F): squared MMD, unbiased, kernel (x.y / F + 1)^3.

    The result is the mean over random subsets of `size` samples of each set. The unbiased estimate may be slightly
    negative if the sets agree. Binkowski et al. 2018.
    """
    _require_features(real, fake)
    size = min(size, len(real), len(fake))
    generator = torch.Generator().manual_seed(seed)
    total = 0.0
    for _ in range(subsets):
        x, y = (
            features[
                torch.randperm(len(features), generator=generator, device="cpu")[:size].to(features.device)
            ].double()
            for features in (real, fake)
        )
        total += float(_mmd2(x, y))
    return total / subsets


def _mmd2(x: Tensor, y: Tensor) -> Tensor:
    n, features = x.shape
    k_xx, k_yy, k_xy = ((a @ b.T / features + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))  # (n, n)
    within = (k_xx.sum() - k_xx.diagonal().sum() + k_yy.sum() - k_yy.diagonal().sum()) / (n * (n - 1))
    return within - 2 * k_xy.mean()


def frechet_distance(real: Tensor, fake: Tensor) -> float:
    """|m_r - m_f|^2 + tr(C_r + C_f - 2 (C_r C_f)^(1/2)) of the means and covariances of features (N, F).

    Biased upwards by about 1 / N, so compare values with equal N, and with the floor. Uses float64. NaN if features are
    not finite. Heusel et al. 2017.
    """
    _require_features(real, fake)
    (mean_r, cov_r), (mean_f, cov_f) = (
        (f.double().mean(0), torch.atleast_2d(torch.cov(f.double().T))) for f in (real, fake)
    )
    if not (cov_r.isfinite().all() and cov_f.isfinite().all()):
        return math.nan  # the decomposition raises an error
    # The eigenvalues of C_r C_f are those of S C_f S with S = C_r^(1/2), which is symmetric.
    values, vectors = torch.linalg.eigh(cov_r)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_f @ root).clamp_min(0).sqrt().sum()
    return float((mean_r - mean_f).square().sum() + cov_r.trace() + cov_f.trace() - 2 * cross)


class Neighbors(NamedTuple):
    density: float  # number of reals' balls that contain a fake, over k; about 1 if the sets agree
    coverage: float  # fraction of reals whose ball contains a fake
    recall: float  # fraction of reals inside at least one fake's ball
    precision: float  # fraction of fakes inside at least one real's ball


def neighbors(real: Tensor, fake: Tensor, k: int = NEIGHBORS) -> Neighbors:
    """Density and coverage (Naeem et al. 2020), precision and recall (Kynkaanniemi et al. 2019) of features (N, F).

    A sample's ball extends to its k-th nearest neighbor in its own set.
    """
    _require_features(real, fake)
    if k >= min(len(real), len(fake)):
        raise ValueError(f"k must be less than the number of samples, got {k} for {len(real)} and {len(fake)} samples")
    real, fake = real.double(), fake.double()
    real_radius, fake_radius = (
        torch.cat([torch.cdist(rows, x).kthvalue(k + 1, dim=1).values for rows in x.split(ROWS)]) for x in (real, fake)
    )
    inside, covered, recalled = torch.zeros(len(fake), dtype=torch.long, device=fake.device), 0, 0
    for rows, radius in zip(real.split(ROWS), real_radius.split(ROWS), strict=True):
        distance = torch.cdist(rows, fake)  # (R, M); all pairs at once would need 20 GB for 50,000 samples
        inside += (distance <= radius[:, None]).sum(0)
        covered += int((distance.min(1).values <= radius).sum())
        recalled += int((distance <= fake_radius).any(1).sum())
    return Neighbors(
        density=float(inside.double().mean() / k),
        coverage=covered / len(real),
        recall=recalled / len(real),
        precision=float((inside > 0).double().mean()),
    )


def inception_score(probabilities: Tensor, splits: int = 10) -> tuple[float, float]:
    """exp(E[KL(p(y | x) || p(y))]) of probabilities of classes (N, K): mean and standard deviation over the splits.

    It is 1 if all samples look alike to the classifier, and at most K. Salimans et al. 2016.
    """
    found = []
    for part in probabilities.double().chunk(min(splits, len(probabilities))):
        p_y = part.mean(0, keepdim=True)
        found.append(float((part * (part.clamp_min(1e-16) / p_y.clamp_min(1e-16)).log()).sum(1).mean().exp()))
    values = torch.tensor(found, dtype=torch.float64, device="cpu")
    return float(values.mean()), float(values.std(correction=0))


def _require_features(real: Tensor, fake: Tensor) -> None:
    if real.ndim != 2 or fake.ndim != 2 or real.shape[1] != fake.shape[1]:
        raise ValueError(f"features must be (N, F) and (M, F), got {tuple(real.shape)} and {tuple(fake.shape)}")
    if min(len(real), len(fake)) < 2:
        raise ValueError(f"each set needs at least 2 samples, got {len(real)} and {len(fake)}")
