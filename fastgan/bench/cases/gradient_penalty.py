"""Training steps of a discriminator: a penalty, or a loss and penalties, and every parameter's gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, grad_and_value
from torch.nn import functional as F

import fastgan
from fastgan.bench import discriminators
from fastgan.bench.case import BASELINE, Case, Make, Run, on_backend

_ANYWHERE, _ON_GPU = ("cpu", "cuda"), ("cuda",)
_PRECISIONS = {"float32": 2e-3, "tf32": 2e-2, "bf16": 2e-1}  # and the tolerance of each
RELATIVISTIC = "relativistic+r1+r2"
WEIGHT = 10.0
SEED = 3

Logits = Callable[[Tensor], Tensor]
Gradient = Callable[[Logits, Tensor], tuple[Tensor, Tensor]]  # (D, x) -> D(x), the gradient of its sum
Objective = Callable[..., Tensor]


def _squares(g: Tensor) -> Tensor:
    return g.flatten(1).square().sum(1)


# Each step twice: as anybody writes it, with a way to get at the gradient, and as fastgan has it.
def _wgan_gp(logits: Logits, real: Tensor, fake: Tensor, alpha: Tensor, gradient: Gradient) -> Tensor:
    g = gradient(logits, torch.lerp(fake, real, alpha))[1]
    return WEIGHT * (g.flatten(1).norm(dim=1) - 1).square().mean()  # type: ignore[no-any-return]


def _fast_wgan_gp(model: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
    generator = torch.Generator(real.device).manual_seed(SEED)
    return fastgan.gradient_penalty(model, real, fake, kind="wgan-gp", weight=WEIGHT, generator=generator)


def _loss_r1(logits: Logits, real: Tensor, fake: Tensor, alpha: Tensor, gradient: Gradient) -> Tensor:
    y, g = gradient(logits, real)
    return F.softplus(-y).mean() + WEIGHT / 2 * _squares(g).mean()


def _fast_loss_r1(model: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
    logits, penalty = fastgan.logits_and_penalty(model, real, kind="r1", weight=WEIGHT)
    return F.softplus(-logits).mean() + penalty


def _relativistic(logits: Logits, real: Tensor, fake: Tensor, alpha: Tensor, gradient: Gradient) -> Tensor:
    (a, g), (b, h) = gradient(logits, real), gradient(logits, fake)
    return F.softplus(b - a).mean() + WEIGHT / 2 * (_squares(g) + _squares(h)).mean()


def _fast_relativistic(model: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
    (a, r1), (b, r2) = (fastgan.logits_and_penalty(model, x, weight=WEIGHT) for x in (real, fake))
    return F.softplus(b - a).mean() + r1 + r2


OBJECTIVES: dict[str, tuple[Objective, Objective]] = {
    "wgan-gp": (_wgan_gp, _fast_wgan_gp),
    "loss+r1": (_loss_r1, _fast_loss_r1),
    RELATIVISTIC: (_relativistic, _fast_relativistic),
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
    if name == "bf16":
        return lambda: torch.autocast(device.type, torch.bfloat16)
    if device.type == "cuda":
        return lambda: torch.backends.cudnn.flags(enabled=True, allow_tf32=name == "tf32")
    return nullcontext


def step(
    make: Callable[[], nn.Module],
    shape: Sequence[int],
    objective: str,
    device: torch.device,
    dtype: torch.dtype,
    precision: str = "float32",
) -> dict[str, Make]:
    """The variants of a step of the discriminator that ``make`` makes, on batches of ``shape``.

    But for ours, what it has of fastgan's layers runs in PyTorch.
    """
    plain, fast = OBJECTIVES[objective]
    real, fake = (torch.randn(*shape, dtype=dtype, device=device) for _ in range(2))
    size = len(real), *[1] * (real.ndim - 1)
    context = _precision(precision, device)

    def model() -> nn.Module:
        torch.manual_seed(0)  # the same weights for each
        with device:
            return make().to(dtype)

    def run_of(net: nn.Module, total: Callable[[], Tensor]) -> Run:
        parameters = list(net.parameters())
        # A bias has no part in some penalties: its gradient is zero, or none at all.
        kept = [p for name, p in net.named_parameters() if not name.endswith("bias")]

        def run() -> Sequence[Tensor]:
            for p in parameters:
                p.grad = None
            with context():
                loss = total()
            loss.backward()
            return [loss.detach(), *(p.grad for p in kept if p.grad is not None)]

        return run

    def draw() -> Tensor:
        generator = torch.Generator(device).manual_seed(SEED)
        return torch.rand(size, dtype=dtype, device=device, generator=generator)

    def eager() -> Run:
        net = model()
        return on_backend("reference", run_of(net, lambda: plain(net, real, fake, draw(), _by_autograd)))

    def fastgans() -> Run:
        net = model()
        return run_of(net, lambda: fast(net, real, fake))

    def compiled() -> Run:
        net = model()

        def total(parameters: dict[str, Tensor], real: Tensor, fake: Tensor, alpha: Tensor) -> Tensor:
            return plain(partial(functional_call, net, parameters), real, fake, alpha, _by_func)

        gradients = torch.compile(grad_and_value(total))
        parameters = {name: p.detach() for name, p in net.named_parameters()}
        kept = [name for name in parameters if not name.endswith("bias")]

        def run() -> Sequence[Tensor]:
            with context():
                found, loss = gradients(parameters, real, fake, draw())
            return [loss, *(found[name] for name in kept)]

        return on_backend("reference", run)

    return {BASELINE: eager, "torch.compile": compiled, "fastgan": fastgans}


def _case(
    name: str,
    make: Callable[[], nn.Module],
    shape: Sequence[int],
    objective: str,
    device_types: tuple[str, ...],
    precision: str = "float32",
) -> Case:
    return Case(
        name=f"{objective}/{name}" + ("" if precision == "float32" else f"/{precision}"),
        op=None,
        dtype=torch.float32,
        device_types=device_types,
        bytes=None,
        operations=None,
        tolerance=_PRECISIONS[precision],
        setup=lambda device, dtype: step(make, shape, objective, device, dtype, precision),
        counted=True,
    )


def _cases() -> Iterator[Case]:
    images = (3, 64, 64)
    for objective in OBJECTIVES:
        yield _case("critic64-batch32", discriminators.critic, (32, *images), objective, _ANYWHERE)
    for objective in ("wgan-gp", "loss+r1"):
        yield _case("critic64-batch4", discriminators.critic, (4, *images), objective, _ANYWHERE)
        yield _case("mlp512-batch256", discriminators.mlp, (256, 2), objective, _ANYWHERE)
    dcgan = partial(discriminators.critic, (3, 64, 128, 256, 512))
    yield _case("dcgan64-batch8", dcgan, (8, *images), "wgan-gp", _ANYWHERE)
    layer_norm = partial(discriminators.layer_norm_critic, 32)
    yield _case("layernorm64-batch8", layer_norm, (8, *images), "wgan-gp", _ANYWHERE)
    for width, batch, where in ((16, 2, _ANYWHERE), (64, 32, _ON_GPU)):
        sngan = partial(discriminators.SNGANResNet, width)
        yield _case(f"sngan128-width{width}-batch{batch}", sngan, (batch, 3, 128, 128), "loss+r1", where)
    for stddev in (False, True):
        style = partial(discriminators.StyleGAN2, 32, 32, 128, stddev=stddev)
        yield _case(f"stylegan2-32-{'' if stddev else 'no-stddev-'}batch8", style, (8, 3, 32, 32), "loss+r1", _ANYWHERE)
    yield _case("r3gan32-batch8", partial(discriminators.R3GAN, 32, 32, 128), (8, 3, 32, 32), RELATIVISTIC, _ANYWHERE)
    for precision in _PRECISIONS:
        for pixels, width, batch in ((256, 64, 16), (512, 32, 8), (1024, 16, 4)):
            style, shape = partial(discriminators.StyleGAN2, pixels, width), (batch, 3, pixels, pixels)
            yield _case(f"stylegan2-{pixels}-batch{batch}", style, shape, "loss+r1", _ON_GPU, precision)
        r3gan = partial(discriminators.R3GAN, 256, 96)
        yield _case("r3gan256-batch16", r3gan, (16, 3, 256, 256), RELATIVISTIC, _ON_GPU, precision)


CASES = list(_cases())
