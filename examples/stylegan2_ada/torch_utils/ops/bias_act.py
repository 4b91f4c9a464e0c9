"""Bias, activation and gain, one step after another."""

from torch.nn import functional as F

ACTIVATIONS = {"linear": (lambda x: x, 1.0), "lrelu": (lambda x: F.leaky_relu(x, 0.2), 2**0.5)}


def bias_act(x, b=None, dim=1, act="linear"):
    activation, gain = ACTIVATIONS[act]
    if b is not None:
        x = x + b.view([-1 if i == dim else 1 for i in range(x.ndim)])
    return activation(x) * gain
