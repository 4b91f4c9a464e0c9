"""Modules for discriminators, built on fastgan.ops."""

from fastgan.nn import utils
from fastgan.nn.gradient_penalty import GradientPenalty
from fastgan.nn.minibatch_discrimination import MinibatchDiscrimination
from fastgan.nn.minibatch_stddev import MinibatchStdDev

__all__ = ["GradientPenalty", "MinibatchDiscrimination", "MinibatchStdDev", "utils"]
