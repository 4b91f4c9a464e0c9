"""Functions on tensors: the fused kernels behind fastgan.nn."""

from fastgan.ops.activation import leaky_relu, relu
from fastgan.ops.conv import conv1d, conv2d, conv3d, conv_transpose1d, conv_transpose2d, conv_transpose3d
from fastgan.ops.minibatch_discrimination import minibatch_discrimination
from fastgan.ops.norm import group_norm, instance_norm, layer_norm
from fastgan.ops.pool import avg_pool1d, avg_pool2d, avg_pool3d
from fastgan.ops.spectral_norm import spectral_norm

__all__ = [
    "avg_pool1d",
    "avg_pool2d",
    "avg_pool3d",
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
    "group_norm",
    "instance_norm",
    "layer_norm",
    "leaky_relu",
    "minibatch_discrimination",
    "relu",
    "spectral_norm",
]
