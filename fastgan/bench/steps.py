"""Timed training steps, in plain PyTorch and as fastgan's documentation recommends."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, grad_and_value
from torch.nn import functional as F

import fastgan
from fastgan.bench.case import BASELINE, Make, Run
from fastgan.bench.convolutions import Graphs

# Tolerances of each precision. At a kink, a difference in the last bit selects another slope. In float32 a deep
# network's gradients then differ by thousandths. In float64, which the tests use, they agree to 1e-13.
PRECISIONS = {"float32": 2e-2, "tf32": 2e-2, "bf16": 2e-1}
# The contributions of reals and fakes to a bias's gradient can cancel. What remains is their rounding error.
NEGLIGIBLE = 1e-4
RELATIVISTIC = "relativistic+r1+r2"
WEIGHT = 10.0
SEED = 3

Logits = Callable[[Tensor], Tensor]
Gradient = Callable[[Logits, Tensor], tuple[Tensor, Tensor]]  # (D, x) -> D(x), gradient of the sum of D(x)


@dataclass(frozen=True)
class Objective:
    """The scalar to differentiate with respect to the parameters, in two forms that call D in the same order.

    ``plain(D, real, fake, alpha, gradient)`` receives a function for D's gradient. ``fast(D, real, fake)`` uses
    fastgan's. If it ``draws``, it also takes a generator. A ``whole`` step has all losses of D and an optimizer step
    with learning rate 0, so that every call computes the same.
    """

    plain: Callable[[Logits, Tensor, Tensor, Tensor, Gradient], Tensor]
    fast: Callable[..., Tensor]
    whole: bool = False
    draws: bool = False  # draws alpha with its own generator, which CUDA graphs do not support


def _squares(g: Tensor) -> Tensor:
    return g.flatten(1).square().sum(1)


def _wgan_gp(logits: Logits, real: Tensor, fake: Tensor, alpha: Tensor, gradient: Gradient) -> Tensor:
    g = gradient(logits, torch.lerp(fake, real, alpha))[1]
    return WEIGHT * (g.flatten(1).norm(dim=1) - 1).square().mean()  # type: ignore[no-any-return]


def _fast_wgan_gp(model: nn.Module, real: Tensor, fake: Tensor, generator: torch.Generator | None = None) -> Tensor:
    generator = generator or torch.Generator(real.device).manual_seed(SEED)
    return fastgan.gradient_penalty(model, real, fake, kind="wgan-gp", weight=WEIGHT, generator=generator)


def _loss_r1(logits: Logits, real: Tensor, fake: Tensor, alpha: Tensor, gradient: Gradient) -> Tensor:
    y, g = gradient(logits, real)
    return F.softplus(-y).mean() + WEIGHT / 2 * _squares(g).mean()


def _fast_loss_r1(model: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
    logits, penalty = fastgan.logits_and_penalty(model, real, kind="r1", weight=WEIGHT)
    return F.softplus(-logits).mean() + penalty


def _r1(logits: Logits, real: Tensor, fake: Tensor, alpha: Tensor, gradient: Gradient) -> Tensor:
    return WEIGHT / 2 * _squares(gradient(logits, real)[1]).mean()


def _fast_r1(model: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
    return fastgan.gradient_penalty(model, real, kind="r1", weight=WEIGHT)


def _relativistic(logits: Logits, real: Tensor, fake: Tensor, alpha: Tensor, gradient: Gradient) -> Tensor:
    (a, g), (b, h) = gradient(logits, real), gradient(logits, fake)
    return F.softplus(b - a).mean() + WEIGHT / 2 * (_squares(g) + _squares(h)).mean()


def _fast_relativistic(model: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
    (a, r1), (b, r2) = (fastgan.logits_and_penalty(model, x, weight=WEIGHT) for x in (real, fake))
    return F.softplus(b - a).mean() + r1 + r2


def _hinge(logits: Logits, real: Tensor, fake: Tensor, *_: object) -> Tensor:
    return F.relu(1 - logits(real)).mean() + F.relu(1 + logits(fake)).mean()


def _non_saturating(logits: Logits, real: Tensor, fake: Tensor, *_: object) -> Tensor:
    return F.softplus(-logits(real)).mean() + F.softplus(logits(fake)).mean()


def _critic(logits: Logits, real: Tensor, fake: Tensor, alpha: Tensor, gradient: Gradient) -> Tensor:
    return logits(fake).mean() - logits(real).mean() + _wgan_gp(logits, real, fake, alpha, gradient)


def _fast_critic(model: nn.Module, real: Tensor, fake: Tensor, generator: torch.Generator | None = None) -> Tensor:
    loss: Tensor = model(fake).mean() - model(real).mean()
    return loss + _fast_wgan_gp(model, real, fake, generator)


def _non_saturating_r1(logits: Logits, real: Tensor, fake: Tensor, alpha: Tensor, gradient: Gradient) -> Tensor:
    return _loss_r1(logits, real, fake, alpha, gradient) + F.softplus(logits(fake)).mean()


def _fast_non_saturating_r1(model: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
    return _fast_loss_r1(model, real, fake) + F.softplus(model(fake)).mean()


OBJECTIVES = {
    "wgan-gp": Objective(_wgan_gp, _fast_wgan_gp, draws=True),
    "r1": Objective(_r1, _fast_r1),
    "loss+r1": Objective(_loss_r1, _fast_loss_r1),
    RELATIVISTIC: Objective(_relativistic, _fast_relativistic),
    "d-step/hinge": Objective(_hinge, _hinge, whole=True),
    "d-step/non-saturating": Objective(_non_saturating, _non_saturating, whole=True),
    "d-step/wgan-gp": Objective(_critic, _fast_critic, whole=True, draws=True),
    "d-step/r1": Objective(_non_saturating_r1, _fast_non_saturating_r1, whole=True),
    f"d-step/{RELATIVISTIC}": Objective(_relativistic, _fast_relativistic, whole=True),
}


def _by_autograd(logits: Logits, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    y = logits(x)
    return y, torch.autograd.grad(y.sum(), x, create_graph=True)[0]


def _by_func(logits: Logits, x: Tensor) -> tuple[Tensor, Tensor]:
    def summed(x: Tensor) -> tuple[Tensor, Tensor]:
        y = logits(x)
        return y.sum(), y

    g, y = grad(summed, has_aux=True)(x)
    return y, g


def _precision(name: str, device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """Return the autocast context of the forward pass."""
    return (lambda: torch.autocast(device.type, torch.bfloat16)) if name == "bf16" else nullcontext


def _rounding(make: Make, precision: str) -> Run:
    """Round the operands of forward and backward convolutions to TF32, or keep them exact."""
    run = make()

    def rounding() -> Sequence[Tensor]:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=precision != "float32"):
            return run()

    if not torch.cuda.is_available():
        return run
    vars(rounding).update(vars(run))
    return rounding


def seeded(make: Callable[[], nn.Module], device: torch.device, dtype: torch.dtype) -> Callable[[], nn.Module]:
    """Return a function that builds the module with the same weights every time."""

    def model() -> nn.Module:
        torch.manual_seed(0)
        with device:
            return make().to(dtype)

    return model


def batches(
    make: Callable[[], nn.Module],
    shape: Sequence[int],
    objective: str,
    device: torch.device,
    dtype: torch.dtype,
    precision: str = "float32",
    function: bool = False,
) -> dict[str, Make]:
    """Return the variants of ``d_step`` for the discriminator that ``make`` builds, on random batches of ``shape``."""
    real, fake = (torch.randn(*shape, dtype=dtype, device=device) for _ in range(2))
    return d_step(seeded(make, device, dtype), real, fake, OBJECTIVES[objective], precision, function)


def d_step(
    model: Callable[[], nn.Module],
    real: Tensor,
    fake: Tensor,
    objective: Objective,
    precision: str = "float32",
    function: bool = False,
) -> dict[str, Make]:
    """Return the variants of a discriminator step: the plain model with PyTorch's penalty, and fastgan's.

    fastgan's variant is converted.

    Args:
        model: builds equal modules on the device of the batches.
        function: give fastgan a function around the module.
    """
    device, dtype = real.device, real.dtype
    size = len(real), *[1] * (real.ndim - 1)
    context = _precision(precision, device)

    def draw() -> Tensor:
        if not objective.draws:
            return real
        generator = torch.Generator(device).manual_seed(SEED)
        return torch.rand(size, dtype=dtype, device=device, generator=generator)

    def eager() -> Run:
        net = model()
        return training(net, lambda: objective.plain(net, real, fake, draw(), _by_autograd), context, objective.whole)

    def fused() -> Run:
        net = model()
        fastgan.convert(net)
        called: Any = (lambda x: net(x)) if function else net
        return training(net, lambda: objective.fast(called, real, fake), context, objective.whole)

    def compiled() -> Run:
        net = model()

        def total(parameters: dict[str, Tensor], real: Tensor, fake: Tensor, alpha: Tensor) -> Tensor:
            return objective.plain(partial(functional_call, net, parameters), real, fake, alpha, _by_func)

        graphs = Graphs()
        gradients = graphs.compile(grad_and_value(total))
        leaves = _trained(net)
        parameters = {name: p.detach() for name, p in leaves.items()}
        move = _optimizer(leaves.values()) if objective.whole else None

        def run() -> Sequence[Tensor]:
            with context():
                found, loss = gradients(parameters, real, fake, draw())
            if move is not None:
                for name, p in leaves.items():
                    p.grad = found[name]
                move()
            return [loss, *(found[name] for name in leaves)]

        return counted(run, graphs)

    def eager_penalty() -> Run:
        """The losses compiled, the penalty not: what PyTorch supports."""
        net, graphs = model(), Graphs()
        logits = graphs.compile(net)

        def gradient(_: Logits, x: Tensor) -> tuple[Tensor, Tensor]:
            return _by_autograd(net, x)

        def total() -> Tensor:
            return objective.plain(logits, real, fake, draw(), gradient)

        return training(net, total, context, objective.whole)

    def backward_inside() -> Run:
        """All in one graph, with a setting that PyTorch has since 2.13 and does not document."""
        net, graphs, options = model(), Graphs(), _options()

        def loss_and_backward(real: Tensor, fake: Tensor, alpha: Tensor) -> Tensor:
            loss = objective.plain(net, real, fake, alpha, _by_autograd)
            loss.backward()
            return loss.detach()

        call = graphs.compile(loss_and_backward, fullgraph=True)

        def total() -> Tensor:
            with options.patch(trace_autograd_ops=True):
                loss: Tensor = call(real, fake, draw())
            return loss

        return counted(training(net, total, context, objective.whole, backward=False), graphs)

    def fused_compiled() -> Run:
        net, graphs = model(), Graphs()
        fastgan.convert(net)
        called: Any = (lambda x: net(x)) if function else net
        call = graphs.compile(lambda *inputs: objective.fast(called, *inputs), fullgraph=True)
        generator = [torch.Generator(device)] if objective.draws else []

        def total() -> Tensor:
            for drawn in generator:
                drawn.manual_seed(SEED)
            loss: Tensor = call(real, fake, *generator)
            return loss

        return counted(training(net, total, context, objective.whole), graphs)

    def fused_inside() -> Run:
        """Loss, penalty and backward in one graph."""
        net, graphs, options = model(), Graphs(), _options()
        fastgan.convert(net)
        called: Any = (lambda x: net(x)) if function else net

        def loss_and_backward(*inputs: Any) -> Tensor:
            loss = objective.fast(called, *inputs)
            loss.backward()
            return loss.detach()

        call = graphs.compile(loss_and_backward, fullgraph=True)
        generator = [torch.Generator(device)] if objective.draws else []

        def total() -> Tensor:
            for drawn in generator:
                drawn.manual_seed(SEED)
            with options.patch(trace_autograd_ops=True):
                loss: Tensor = call(real, fake, *generator)
            return loss

        return counted(training(net, total, context, objective.whole, backward=False), graphs)

    variants = {BASELINE: eager, "torch.compile": compiled}
    if objective.whole:
        variants["torch.compile, eager penalty"] = eager_penalty
    variants |= {
        "torch.compile, backward inside": backward_inside,
        "fastgan": fused,
        "fastgan, compiled": fused_compiled,
        "fastgan, compiled, backward inside": fused_inside,
    }
    return {name: partial(_rounding, make, precision) for name, make in variants.items()}


def _options() -> Any:
    options = torch._dynamo.config
    if not hasattr(options, "trace_autograd_ops"):
        raise RuntimeError("this PyTorch has no torch._dynamo.config.trace_autograd_ops")
    return options


def g_step(
    generator: Callable[[], nn.Module], discriminator: Callable[[], nn.Module], z: Tensor, precision: str = "float32"
) -> dict[str, Make]:
    """Return the variants of a generator step through a fixed discriminator: both networks plain, or both converted."""
    context = _precision(precision, z.device)

    def variant(finish: Callable[[nn.Module], object]) -> Run:
        net, judge = generator(), discriminator().requires_grad_(False)
        finish(net)
        finish(judge)
        return training(net, lambda: F.softplus(-judge(net(z))).mean(), context, whole=True)

    def compiled() -> Run:
        net, judge = generator(), discriminator().requires_grad_(False)
        logits = torch.compile(lambda z: judge(net(z)))
        return training(net, lambda: F.softplus(-logits(z)).mean(), context, whole=True)

    leave: Callable[[nn.Module], object] = lambda net: None  # noqa: E731
    variants: dict[str, Make] = {
        BASELINE: partial(variant, leave),
        "torch.compile": compiled,
        "fastgan": partial(variant, fastgan.convert),
    }
    return {name: partial(_rounding, make, precision) for name, make in variants.items()}


def counted(run: Run, graphs: Graphs) -> Run:
    """Give a run the graphs that it runs."""
    vars(run)["graphs"] = graphs
    return run


def training(
    net: nn.Module,
    total: Callable[[], Tensor],
    context: Callable[[], AbstractContextManager[Any]],
    whole: bool,
    *,
    backward: bool = True,
) -> Run:
    """Return a run that computes the gradients of ``total()`` and, if ``whole``, takes an optimizer step.

    Args:
        backward: whether ``total()`` leaves the backward to the run.
    """
    parameters = list(_trained(net).values())
    nothing = [torch.zeros((), dtype=p.dtype, device=p.device).expand_as(p) for p in parameters]  # needs no memory
    move = _optimizer(parameters) if whole else None

    def run() -> Sequence[Tensor]:
        for p in parameters:
            p.grad = None
        with context():
            loss = total()
        if backward:
            loss.backward()
        if move is not None:
            move()
        return [
            loss.detach(),
            *(none if p.grad is None else p.grad for p, none in zip(parameters, nothing, strict=True)),
        ]

    return run


def _trained(net: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trained parameters in the order of their names, which conversion keeps."""
    return {name: p for name, p in sorted(net.named_parameters()) if p.requires_grad}


def _optimizer(parameters: Iterable[Tensor]) -> Callable[[], object]:
    leaves = list(parameters)
    return torch.optim.Adam(leaves, lr=0.0, capturable=leaves[0].is_cuda).step
