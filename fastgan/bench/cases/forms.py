"""Loss + R1 of discriminators in the forms of well-known families: the work in forwards, the path, the speed-up."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastgan
from fastgan.bench.case import BASELINE, Case, Make, Run
from fastgan.bench.flops import count_flops
from fastgan.bench.forms import FORMS, Form
from fastgan.bench.steps import NEGLIGIBLE, PRECISIONS, SEED, WEIGHT, seeded, training

_PREFIX = "forms/"


def setup(form: Form, width: int, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> dict[str, Make]:
    """Gradients of loss + R1 of the form at this width, on a random batch of this shape."""
    x = torch.randn(shape, dtype=dtype, device=device)
    args = form.arguments(len(x), device)
    make = seeded(partial(form.make, width), device, dtype)

    def variant(total: Callable[[nn.Module], Tensor], convert: bool) -> Run:
        net = make()
        if convert:
            fastgan.convert(net)

        def drawn() -> Tensor:
            if form.draws:
                torch.manual_seed(SEED)
            return total(net)

        return training(net, drawn, nullcontext, whole=False)

    def plain(net: nn.Module) -> Tensor:
        point = x.detach().requires_grad_()
        logits = _chosen(form, net(point, *args))
        ones = [torch.ones_like(tensor) for tensor in logits]
        (g,) = torch.autograd.grad(logits, point, ones, create_graph=True)
        return _loss(form, logits) + WEIGHT / 2 * g.flatten(1).square().sum(1).mean()

    def fast(net: nn.Module) -> Tensor:
        returned, penalty = fastgan.logits_and_penalty(net, x, kind="r1", weight=WEIGHT, select=form.select, args=args)
        return _loss(form, _chosen(form, returned)) + penalty

    return {BASELINE: lambda: variant(plain, False), "fastgan": lambda: variant(fast, True)}


def _chosen(form: Form, returned: Any) -> list[Tensor]:
    if isinstance(returned, Tensor):
        return [returned]
    keys = range(len(returned)) if form.select is None else form.select
    return [returned[key] for key in ((keys,) if isinstance(keys, int) else keys)]


def _loss(form: Form, logits: list[Tensor]) -> Tensor:
    each = [(-tensor if form.critic else F.softplus(-tensor)).mean() for tensor in logits]
    return torch.stack(each).sum()


def about(form: Form, width: int, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """A forward's work, and the path that loss and penalty take."""
    net = seeded(partial(form.make, width), device, dtype)()
    x = torch.randn(shape, dtype=dtype, device=device)
    args = form.arguments(len(x), device)
    path = fastgan.explain_penalty(net, x, select=form.select, args=args)
    return {"forward_flops": count_flops(lambda: net(x, *args)), "path": path}


def _case(name: str, form: Form) -> Case:
    return Case(
        name=_PREFIX + name,
        op=None,
        dtype=torch.float32,
        device_types=("cpu", "cuda"),
        bytes=None,
        operations=None,
        tolerance=PRECISIONS["float32"],
        setup=partial(setup, form, form.width, form.shape),
        suite="forms",
        counted=("flops",),
        family=_PREFIX + name,
        sizes={"width": form.width, "batch": form.shape[0]},
        negligible=NEGLIGIBLE,
        about=partial(about, form, form.width, form.shape),
    )


CASES = [_case(name, form) for name, form in FORMS.items()]
