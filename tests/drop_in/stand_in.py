"""Stand-ins of StyleGAN's code bases, in the folder stand_ins."""

from __future__ import annotations

import importlib

from fastgan.drop_in import torch_utils as ours


def imported(name):
    return importlib.import_module(name)


def is_ours(function):
    """Whether this is fastgan's function. Each original has a copy of its own."""
    return function.__code__ is getattr(ours, function.__name__).__code__
