"""Functions on tensors: the fused kernels behind fastgan.nn."""

from fastgan.ops.spectral_norm import spectral_norm

__all__ = ["spectral_norm"]
