import torch
from torch.nn import functional as F

ACTIVATIONS = {
    "linear": (lambda x, alpha: x, 1),
    "relu": (lambda x, alpha: F.relu(x), 2**0.5),
    "lrelu": (lambda x, alpha: F.leaky_relu(x, 0.2 if alpha is None else alpha), 2**0.5),
    "tanh": (lambda x, alpha: torch.tanh(x), 1),
    "sigmoid": (lambda x, alpha: torch.sigmoid(x), 1),
    "elu": (lambda x, alpha: F.elu(x), 1),
    "selu": (lambda x, alpha: F.selu(x), 1),
    "softplus": (lambda x, alpha: F.softplus(x), 1),
    "swish": (lambda x, alpha: torch.sigmoid(x) * x, 2**0.5),
}


def bias_act(x, b=None, dim=1, act="linear", alpha=None, gain=None, clamp=None, impl="cuda"):
    if b is not None:
        x = x + b.reshape([-1 if i == dim else 1 for i in range(x.ndim)])
    function, own = ACTIVATIONS[act]
    x = function(x, alpha) * (own if gain is None else gain)
    return x if clamp is None or clamp < 0 else x.clamp(-clamp, clamp)
