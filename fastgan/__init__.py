"""Exact, fast kernels for the methods that stabilize GAN training."""

from fastgan import _start as _start  # isort: split

from fastgan import nn, ops
from fastgan._version import __version__
from fastgan.backends import BackendUnavailable, info, use_backend
from fastgan.convert import convert, revert
from fastgan.drop_in import patch_torch_utils
from fastgan.graphs import graphed_step
from fastgan.launcher.session import enabled
from fastgan.ops.compilable import compilable
from fastgan.ops.gradient_penalty import explain_penalty, gradient_penalty, logits_and_penalty, penalty_from_logits
from fastgan.ops.twice_differentiable import twice_differentiable

__all__ = [
    "BackendUnavailable",
    "__version__",
    "compilable",
    "convert",
    "enabled",
    "explain_penalty",
    "gradient_penalty",
    "graphed_step",
    "info",
    "logits_and_penalty",
    "nn",
    "ops",
    "patch_torch_utils",
    "penalty_from_logits",
    "revert",
    "twice_differentiable",
    "use_backend",
]
