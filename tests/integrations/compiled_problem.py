"""Discriminators and training steps for the tests of compiled penalties."""

from __future__ import annotations

import copy

import torch
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fastgan
from fastgan import nn as fnn
from fastgan.nn.utils import fuse_spectral_norm

N, WEIGHT = 4, 3.0


class Critic(nn.Module):
    """Two convolutions with a layer between them, and a linear layer."""

    def __init__(self, between: nn.Module | None = None, activation: nn.Module | None = None, channels: int = 6):
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, 2, 1)  # (N, 6, 8, 8)
        self.between = between or nn.Identity()
        self.activation = activation or nn.LeakyReLU(0.2)
        self.second = nn.Conv2d(channels, 5, 3, 2, 1)  # (N, 5, 4, 4)
        self.last = nn.Linear(80, 1)

    def features(self, x):
        return self.activation(self.between(self.first(x)))

    def forward(self, x):
        return self.last(self.activation(self.second(self.features(x))).flatten(1))


class Attributes(Critic):
    def __init__(self):
        super().__init__()
        self.scale, self.shift = torch.full((6, 1, 1), 0.7), 0.3

    def features(self, x):
        return F.relu(self.first(x) * self.scale.to(x.dtype) + self.shift)


class Remembers(Critic):
    def features(self, x):
        self.seen = super().features(x).detach()
        return super().features(x)


class Checkpointed(Critic):
    def features(self, x):
        return checkpoint(super().features, x, use_reentrant=False)


class Scales(Critic):
    def forward(self, x):
        h = self.features(x)
        score = self.second.weight[:1, :, :1, :1]
        return [F.conv2d(h, score), F.conv2d(F.avg_pool2d(h, 2), score)]


class Tied(Critic):
    def __init__(self):
        super().__init__(nn.Conv2d(6, 6, 3, 1, 1))
        self.again = nn.Conv2d(6, 6, 3, 1, 1)
        self.again.weight = self.between.weight

    def features(self, x):
        return F.relu(self.again(F.relu(super().features(x))))


class Attention(Critic):
    def features(self, x):
        h = self.first(x).flatten(2)  # (N, 6, 64)
        return (h @ (h.mT @ h).mul(0.1).softmax(-1)).view(-1, 6, 8, 8)


class Residual(Critic):
    def features(self, x):
        h = self.first(x)
        return h + F.interpolate(F.avg_pool2d(F.relu(h), 2), scale_factor=2) / 2


class Hooked(Critic):
    def __init__(self):
        super().__init__()
        self.first.register_forward_hook(lambda module, inputs, output: output * 0.5)


class Multiplied(Critic):
    """Modules of one and three dimensions, and a transposed convolution."""

    def __init__(self):
        super().__init__()
        self.along = nn.Conv1d(6, 6, 3, 1, 1)
        self.up = nn.ConvTranspose2d(6, 6, 3, 1, 1)
        self.deep = nn.Conv3d(1, 1, 3, 1, 1)

    def features(self, x):
        h = self.up(F.relu(self.first(x)))
        h = self.along(F.relu(h).flatten(2)).view(-1, 6, 8, 8)
        return self.deep(F.relu(h)[:, None])[:, 0]


def spectral(norm, fuse=False):
    model = Critic()
    for name in ("first", "second", "last"):
        norm(getattr(model, name))
    return fuse_spectral_norm(model) if fuse else model


def frozen(*names):
    model = Critic()
    for name in names:
        getattr(model, name).requires_grad_(False)
    return model


def weight_normed():
    model = Critic()
    parametrizations.weight_norm(model.second)
    return model


def converted():
    model = spectral(parametrizations.spectral_norm)
    assert fastgan.convert(model).replaced
    return model


def part_compiled():
    model = Critic(nn.Conv2d(6, 6, 3, 1, 1))
    model.between.compile(backend="aot_eager")
    return model


DISCRIMINATORS = {
    "leaky ReLU": Critic,
    "ReLU in place": lambda: Critic(activation=nn.ReLU(inplace=True)),
    "PReLU": lambda: Critic(activation=nn.PReLU()),
    "SiLU": lambda: Critic(activation=nn.SiLU()),
    "tanh": lambda: Critic(activation=nn.Tanh()),
    "batch norm": lambda: Critic(nn.BatchNorm2d(6)),
    "batch norm in evaluation": lambda: Critic(nn.BatchNorm2d(6)).eval(),
    "layer norm": lambda: Critic(nn.LayerNorm([6, 8, 8])),
    "group norm": lambda: Critic(nn.GroupNorm(3, 6)),
    "instance norm": lambda: Critic(nn.InstanceNorm2d(6, affine=True)),
    "spectral norm": lambda: spectral(parametrizations.spectral_norm),
    "fastgan's spectral norm": lambda: spectral(fnn.utils.spectral_norm),
    "fused spectral norm": lambda: spectral(parametrizations.spectral_norm, fuse=True),
    "fused spectral norm of the older hook": lambda: spectral(nn.utils.spectral_norm, fuse=True),
    "converted": converted,
    "weight norm": weight_normed,
    "minibatch stddev": lambda: Critic(fnn.MinibatchStdDev(4), channels=7),
    "minibatch discrimination": lambda: Critic(
        nn.Sequential(
            nn.Flatten(), nn.Linear(384, 12), fnn.MinibatchDiscrimination(12, 4, 3), nn.Unflatten(1, (4, 2, 2))
        ),
        channels=4,
    ),
    "max pooling": lambda: Critic(nn.MaxPool2d(3, 1, 1)),
    "reflection": lambda: Critic(nn.Sequential(nn.ReflectionPad2d(1), nn.AvgPool2d(3, 1))),
    "residual": Residual,
    "attention": Attention,
    "other convolutions": Multiplied,
    "tensors as attributes": Attributes,
    "features left on the module": Remembers,
    "checkpointed": Checkpointed,
    "several scales": Scales,
    "tied weights": Tied,
    "a forward hook": Hooked,
    "a frozen layer": lambda: frozen("first"),
    "all frozen but one": lambda: frozen("first", "last"),
    "a compiled submodule": part_compiled,
}


class Counted:
    """aot_eager, with the number of convolutions in what AOTAutograd recorded."""

    def __init__(self):
        self.convolutions = 0

    def __call__(self, graph, inputs):
        return aot_autograd(fw_compiler=self.count, bw_compiler=self.count)(graph, inputs)

    def count(self, graph, _):
        self.convolutions += sum(convolutions_of(node.target, node.args) for node in graph.graph.nodes)
        return make_boxed_func(graph.forward)


class CountedEagerly(TorchDispatchMode):
    convolutions = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.convolutions += convolutions_of(function, args)
        return function(*args, **(kwargs or {}))


def convolutions_of(function, args):
    """Return the number of convolutions of an operator. Each gradient of an input or a weight is one."""
    if function is torch.ops.aten.convolution_backward.default:
        return sum(args[-1][:2])
    return int(function is torch.ops.aten.convolution.default)


def make(name):
    torch.manual_seed(0)
    model = DISCRIMINATORS[name]()
    if name == "minibatch discrimination":
        model.last = nn.Linear(5, 1)
    return model


def images(n=N):
    return torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def loss_of(logits):
    parts = logits if isinstance(logits, list) else [logits]
    return sum(F.softplus(-part).mean() for part in parts)


def plain_penalty(logits, x):
    """R1 by PyTorch alone."""
    parts = logits if isinstance(logits, list) else [logits]
    (grad,) = torch.autograd.grad([part.sum() for part in parts], x, create_graph=True)
    return WEIGHT / 2 * grad.square().sum((1, 2, 3)).mean()


def gradient_penalty(discriminator, x):
    return loss_of(discriminator(x)) + fastgan.gradient_penalty(discriminator, x, kind="r1", weight=WEIGHT)


def logits_and_penalty(discriminator, x):
    logits, penalty = fastgan.logits_and_penalty(discriminator, x, kind="r1", weight=WEIGHT)
    return loss_of(logits) + penalty


def plain_gradient_penalty(discriminator, x):
    loss, points = loss_of(discriminator(x)), x.detach().requires_grad_()
    return loss + plain_penalty(discriminator(points), points)


def plain_logits_and_penalty(discriminator, x):
    points = x.detach().requires_grad_()
    logits = discriminator(points)
    return loss_of(logits) + plain_penalty(logits, points)


def both(discriminator, x):
    penalty = fastgan.gradient_penalty(discriminator, x, kind="r1", weight=WEIGHT)
    return penalty + logits_and_penalty(discriminator, x)


def plain_both(discriminator, x):
    points = x.detach().requires_grad_()
    return plain_penalty(discriminator(points), points) + plain_logits_and_penalty(discriminator, x)


PLAIN = {
    gradient_penalty: plain_gradient_penalty,
    logits_and_penalty: plain_logits_and_penalty,
    both: plain_both,
}
STEPS = (gradient_penalty, logits_and_penalty)


def gradients(model, loss):
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return dict(zip(named, torch.autograd.grad(loss, list(named.values()), allow_unused=True), strict=True))


def assert_same(actual, expected, tolerance):
    scale = max(grad.norm() for grad in expected.values() if grad is not None)
    for name, grad in expected.items():
        if grad is None or not grad.any():
            assert actual[name] is None or actual[name].norm() <= tolerance * scale, name
        else:
            error = (actual[name].to(grad.dtype) - grad).norm() / max(grad.norm(), 1e-3 * scale)
            assert error <= tolerance, f"{name}: {error:.1e}"


def assert_trains_alike(step, compiled, model, tolerance=1e-4):
    """Compare two steps with PyTorch in float64: gradients, and parameters and buffers after the steps."""
    twin = copy.deepcopy(model).double()
    x = images()
    for _ in range(2):
        expected = gradients(twin, PLAIN[step](twin, x.double()))
        assert_same(gradients(model, compiled(model, x)), expected, tolerance)
        with torch.no_grad():
            for net in (model, twin):
                for name, parameter in net.named_parameters():
                    if expected.get(name) is not None:
                        parameter -= 0.01 * expected[name].to(parameter.dtype)
    for (name, value), wanted in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(value.to(wanted.dtype), wanted, rtol=1e-4, atol=1e-5, msg=name)
