"""A normalization, its operands, and its derivatives up to the second compared with PyTorch's in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastgan import ops
from tests.harness import assert_close

# Odd, prime, 1; one element a channel, one channel a row; above a line of the CPU kernels and a block of the Triton
# kernels and below them; many short rows, few long ones.
CASES = {
    "layer, rows of 7": ("layer_norm", (5, 7), (7,)),
    "layer, rows of 1": ("layer_norm", (4, 1), (1,)),
    "layer, one vector": ("layer_norm", (31,), (31,)),
    "layer, images": ("layer_norm", (3, 4, 5, 6), (4, 5, 6)),
    "layer, many rows": ("layer_norm", (70, 33), (33,)),
    "layer, long rows": ("layer_norm", (2, 10007), (10007,)),
    "layer, rows of several programs": ("layer_norm", (2, 20011), (20011,)),
    "group, rows of several programs": ("group_norm", (1, 4, 97, 91), 2),
    "group, vectors": ("group_norm", (6, 12), 3),
    "group, 1-D": ("group_norm", (2, 15, 13), 5),
    "group, 2-D": ("group_norm", (3, 12, 5, 5), 4),
    "group, 3-D": ("group_norm", (2, 4, 3, 4, 5), 2),
    "group, one group": ("group_norm", (2, 6, 7), 1),
    "group, long rows": ("group_norm", (1, 6, 61, 37), 2),
    "instance, 1-D": ("instance_norm", (3, 5, 17), None),
    "instance, 2-D": ("instance_norm", (2, 3, 9, 11), None),
    "instance, 3-D": ("instance_norm", (2, 3, 3, 4, 5), None),
    "instance, long channels": ("instance_norm", (1, 2, 97, 53), None),
    "batch, vectors": ("batch_norm", (13, 6), None),
    "batch, 1-D": ("batch_norm", (3, 5, 17), None),
    "batch, 2-D": ("batch_norm", (5, 3, 7, 5), None),
    "batch, long channels": ("batch_norm", (2, 2, 41, 31), None),
    "batch, channels of several tiles": ("batch_norm", (3, 2, 61, 53), None),
    "batch, many vectors": ("batch_norm", (1031, 40), None),
    "group, channels_last": ("group_norm", (3, 12, 5, 7), 4, torch.channels_last),
    "group, channels_last, wide": ("group_norm", (2, 1034, 3, 3), 2, torch.channels_last),
    "group, channels_last, many": ("group_norm", (17, 6, 3, 3), 3, torch.channels_last),
    "instance, channels_last": ("instance_norm", (2, 6, 23, 31), None, torch.channels_last),
    "batch, channels_last": ("batch_norm", (3, 5, 7, 9), None, torch.channels_last),
    "batch, channels_last, 3-D": ("batch_norm", (2, 3, 11, 13, 17), None, torch.channels_last_3d),
    "layer, channels_last": ("layer_norm", (3, 4, 5, 6), (4, 5, 6), torch.channels_last),
}
# There is no bias without a weight: PyTorch's group_norm and layer_norm have no derivative then.
AFFINE = {"weight and bias": (True, True), "no affine": (False, False), "weight": (True, False)}
PARTS = ("x", "weight", "bias", "scale")


@dataclass
class Problem:
    """An op and its operands, drawn in float64 and rounded to a dtype, so that every dtype sees one problem."""

    op: str
    argument: object
    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    scale: Tensor

    def to(self, dtype: torch.dtype) -> Problem:
        parts = {name: getattr(self, name) for name in PARTS}
        leaves = {n: None if t is None else t.detach().to(dtype, copy=True).requires_grad_() for n, t in parts.items()}
        return Problem(self.op, self.argument, **leaves)

    def leaves(self) -> list[Tensor]:
        return [t for t in (self.x, self.weight, self.bias, self.scale) if t is not None]

    def __call__(self, backend: str, x: Tensor | None = None) -> Tensor:
        return apply(self.op, self.argument, self.x if x is None else x, self.weight, self.bias, backend)


def apply(op, argument, x, weight, bias, backend):
    if op == "instance_norm":
        return ops.instance_norm(x, weight=weight, bias=bias, backend=backend)
    if op == "batch_norm":
        return ops.batch_norm(x, None, None, weight, bias, training=True, backend=backend)
    return getattr(ops, op)(x, argument, weight, bias, backend=backend)


def problem_of(case, affine=(True, True), dtype=torch.float64, device="cpu", offset=0.5):
    op, shape, argument, *order = CASES[case] if isinstance(case, str) else case
    of_channel = argument if op == "layer_norm" else shape[1:2]
    draws = {"x": torch.randn(shape, dtype=torch.float64) + offset, "scale": torch.randn(shape, dtype=torch.float64)}
    draws["weight"] = 1 + torch.randn(of_channel, dtype=torch.float64) / 2 if affine[0] else None
    draws["bias"] = torch.randn(of_channel, dtype=torch.float64) if affine[1] else None
    if order:
        draws["x"] = draws["x"].contiguous(memory_format=order[0])
    return Problem(op, argument, **{n: None if t is None else t.to(device, dtype) for n, t in draws.items()})


def values_and_gradients(problem: Problem, backend: str) -> list[tuple[int, Tensor]]:
    """(order of derivative, result)."""
    y = problem(backend)
    by = [t for t in (problem.x, problem.weight, problem.bias) if t is not None]
    return [(0, y), *((1, g) for g in torch.autograd.grad(y, by, problem.scale.detach()))]


def penalty_gradients(problem: Problem, backend: str) -> list[tuple[int, Tensor]]:
    """Through a penalty on the gradient of x, as for a critic, and through one on the gradients of weight and bias."""
    score = (torch.tanh(problem(backend)) * problem.scale).sum()
    (grad_x,) = torch.autograd.grad(score, problem.x, create_graph=True)
    affine = [t for t in (problem.weight, problem.bias) if t is not None]
    grads = torch.autograd.grad(score, affine, create_graph=True) if affine else ()
    results = list(torch.autograd.grad(grad_x.square().mean(), problem.leaves(), retain_graph=True))
    if grads:
        results += torch.autograd.grad(sum(g.square().mean() for g in grads), problem.leaves())
    return [(2, result) for result in results]


def compare(compute, problem, backend, dtype):
    exact = compute(problem.to(torch.float64), "reference")
    own = compute(problem.to(dtype), "reference")
    actual = compute(problem.to(dtype), backend)
    for (order, a), (_, e), (_, o) in zip(actual, exact, own, strict=True):
        assert a.dtype == dtype
        if e.norm() < 1e-9:  # with one value per row, only rounding errors remain, times 1 / sqrt(eps) per order
            assert a.double().norm() <= 1e5 * torch.finfo(dtype).eps
        else:
            assert_close(a, e.to(a.device), order=order, reference=o)
