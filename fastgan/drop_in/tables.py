"""The functions that are replaced, by module, and their replacements."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fastgan.drop_in import rosinality, torch_utils
from fastgan.drop_in.late import CompiledLate

Functions = Mapping[str, Callable[..., Any]]

_GRADFIX: Functions = {"conv2d": torch_utils.conv2d, "conv_transpose2d": torch_utils.conv_transpose2d}
_UPFIRDN: Functions = {
    "upfirdn2d": torch_utils.upfirdn2d,
    "filter2d": torch_utils.filter2d,
    "upsample2d": torch_utils.upsample2d,
    "downsample2d": torch_utils.downsample2d,
}
_ROSINALITY_UPFIRDN: Functions = {"upfirdn2d": rosinality.upfirdn2d}
_ROSINALITY_ACT: Functions = {"fused_leaky_relu": rosinality.fused_leaky_relu}
_STYLEGAN: dict[str, Functions] = {
    "upfirdn2d": _UPFIRDN,
    "bias_act": {"bias_act": torch_utils.bias_act},
    "filtered_lrelu": {"filtered_lrelu": torch_utils.filtered_lrelu},
    "conv2d_gradfix": _GRADFIX,
    "conv2d_resample": {"conv2d_resample": torch_utils.conv2d_resample},
    "grid_sample_gradfix": {"grid_sample": torch_utils.grid_sample},
    "fma": {"fma": torch_utils.fma},
}
_COMPILER: Functions = {"get_plugin": CompiledLate}
# NVIDIA's package, and those of StudioGAN and MMGeneration
_PACKAGES = ("torch_utils.ops", "style_ops", "stylegan3.ops")
# Keys are the ends of module names.
TABLES: dict[str, Functions] = {
    **{f"{package}.{module}": functions for package in _PACKAGES for module, functions in _STYLEGAN.items()},
    "torch_utils.custom_ops": _COMPILER,
    "style_ops.custom_ops": _COMPILER,
    "op.upfirdn2d": _ROSINALITY_UPFIRDN,
    "op.fused_act": _ROSINALITY_ACT,
    "op.conv2d_gradfix": _GRADFIX,
    "basicsr.ops.upfirdn2d.upfirdn2d": _ROSINALITY_UPFIRDN,
    "basicsr.ops.fused_act.fused_act": _ROSINALITY_ACT,
}
