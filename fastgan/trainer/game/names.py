"""Names of losses, penalties, optimizers and augmentations, for settings. This module does not import PyTorch."""

from __future__ import annotations

from typing import Literal

LossName = Literal["non-saturating", "saturating", "hinge", "least-squares", "wasserstein", "relativistic"]
PenaltyName = Literal[
    "none",
    "wgan-gp",
    "wgan-lp",
    "r1",
    "r2",
    "r1+r2",
    "dragan",
    "zero-centered",
    "max-gp",
    "r1-finite-difference",
]
APPROXIMATE = ("r1-finite-difference",)  # by differences of forwards
OptimizerName = Literal["adam", "optimistic-adam", "extra-adam"]
AugmentName = Literal["none", "diffaugment", "ada"]
Kernels = Literal["fastgan", "torch"]
