"""Drop-in modules over fastgan.ops."""

from fastgan.nn import utils
from fastgan.nn.gradient_penalty import GradientPenalty

__all__ = ["GradientPenalty", "utils"]
