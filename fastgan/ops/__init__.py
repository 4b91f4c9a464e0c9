"""Functional interface: the fused operations behind fastgan.nn."""

from fastgan.ops.attention import scaled_dot_product_attention
from fastgan.ops.bias_act import bias_act, leaky_relu, relu
from fastgan.ops.conv import conv1d, conv2d, conv3d, conv_transpose1d, conv_transpose2d, conv_transpose3d
from fastgan.ops.conv2d_resample import conv2d_resample
from fastgan.ops.filtered_lrelu import filtered_lrelu
from fastgan.ops.grid_sample import grid_sample
from fastgan.ops.linear import linear
from fastgan.ops.minibatch_discrimination import minibatch_discrimination
from fastgan.ops.minibatch_stddev import minibatch_stddev
from fastgan.ops.norm import batch_norm, group_norm, instance_norm, layer_norm
from fastgan.ops.pool import avg_pool1d, avg_pool2d, avg_pool3d
from fastgan.ops.spectral_norm import spectral_norm
from fastgan.ops.upfirdn2d import downsample2d, filter2d, upfirdn2d, upsample2d

__all__ = [
    "avg_pool1d",
    "avg_pool2d",
    "avg_pool3d",
    "batch_norm",
    "bias_act",
    "conv1d",
    "conv2d",
    "conv2d_resample",
    "conv3d",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
    "downsample2d",
    "filter2d",
    "filtered_lrelu",
    "grid_sample",
    "group_norm",
    "instance_norm",
    "layer_norm",
    "leaky_relu",
    "linear",
    "minibatch_discrimination",
    "minibatch_stddev",
    "relu",
    "scaled_dot_product_attention",
    "spectral_norm",
    "upfirdn2d",
    "upsample2d",
]
