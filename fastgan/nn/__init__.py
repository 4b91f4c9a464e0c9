"""Drop-in modules over fastgan.ops."""

from fastgan.nn import utils

__all__ = ["utils"]
