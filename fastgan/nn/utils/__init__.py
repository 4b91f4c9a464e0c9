"""Drop-in replacements for torch.nn.utils."""

from fastgan.nn.utils.fuse_spectral_norm import fuse_spectral_norm
from fastgan.nn.utils.spectral_norm import SpectralNorm, spectral_norm
from fastgan.nn.utils.state_dict import convert_spectral_norm_state_dict

__all__ = ["SpectralNorm", "convert_spectral_norm_state_dict", "fuse_spectral_norm", "spectral_norm"]
