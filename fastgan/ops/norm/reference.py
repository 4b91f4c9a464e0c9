"""PyTorch's own normalisations: the specification, the fallback and the benchmark's baseline."""

from torch.nn.functional import batch_norm, group_norm, instance_norm, layer_norm

__all__ = ["batch_norm", "group_norm", "instance_norm", "layer_norm"]
