"""Modules for discriminators, built on fastgan.ops."""

from fastgan.nn import utils
from fastgan.nn.gradient_normalized import GradientNormalized
from fastgan.nn.gradient_penalty import GradientPenalty
from fastgan.nn.minibatch_discrimination import MinibatchDiscrimination
from fastgan.nn.minibatch_stddev import MinibatchStdDev
from fastgan.nn.path_length_penalty import PathLengthPenalty

__all__ = [
    "GradientNormalized",
    "GradientPenalty",
    "MinibatchDiscrimination",
    "MinibatchStdDev",
    "PathLengthPenalty",
    "utils",
]
