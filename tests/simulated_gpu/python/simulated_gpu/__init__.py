"""CUDA devices that are the CPU: ``cuda:0`` and more for PyTorch's CPU build, with the rules of a GPU.

``install()`` has to be called before PyTorch is imported. Environment variables, read once:

- ``SIMULATED_GPU=1``: every Python process that has this folder in PYTHONPATH calls ``install()`` at its start.
- ``SIMULATED_GPU_DEVICES=2``: how many devices there are; one unless this is set.
- ``SIMULATED_GPU_DEFERRED=1``: work waits in its stream until somebody needs it.
- ``SIMULATED_GPU_HOST_TIMES=1``: events give the host's times, which say nothing about a GPU; else they refuse.
- ``SIMULATED_GPU_CPU_GENERATORS=1``: CPU generators are allowed on CUDA tensors, for tests written for the CPU that run
  with ``cuda`` as default device.
"""

from simulated_gpu.build import CannotSimulate
from simulated_gpu.install import install, is_installed

__all__ = ["CannotSimulate", "install", "is_installed"]
