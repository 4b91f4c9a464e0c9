"""Exact, fast kernels for what makes GAN training stable."""

from fastgan import nn, ops
from fastgan._version import __version__
from fastgan.backends import BackendUnavailable, info, use_backend

__all__ = ["BackendUnavailable", "__version__", "info", "nn", "ops", "use_backend"]
