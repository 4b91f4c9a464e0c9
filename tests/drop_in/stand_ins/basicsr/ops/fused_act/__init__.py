from .fused_act import fused_leaky_relu

__all__ = ["fused_leaky_relu"]
