"""Inductor runs a sum before the operator that writes one of its operands: a report to PyTorch, without fastgan.

    MALLOC_PERTURB_=128 python tests/integrations/inductor_order.py      3.4e+38 with torch 2.13.0+cpu

SchedulerNode.recompute_size_and_body replaces the dependencies of ``d + y`` by those of its loop body, when the loop is
aligned with the two of ``d`` to fuse them. It renames the mutated buffer again only if there are fake dependencies.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._inductor import config

LIBRARY = torch.library.Library("inductor_order", "DEF")
LIBRARY.define("double_into(Tensor x, Tensor(a!) y) -> ()")
LIBRARY.impl("double_into", lambda x, y: [y.copy_(2 * x)].clear(), "CompositeExplicitAutograd")
torch.library.register_fake("inductor_order::double_into", lambda x, y: None, lib=LIBRARY)


def add(x: Tensor, gate: Tensor, *terms: Tensor) -> Tensor:
    d = gate * sum(terms)  # two loops, because the gate is broadcast; in memory, because it has many inputs
    y = torch.empty_like(x)
    torch.ops.inductor_order.double_into(x.mm(x), y)
    return d + y  # one loop


def main() -> None:
    config.reorder_for_locality = False  # as in the graph of a backward
    x, gate, terms = torch.randn(16, 16), torch.randn(16), torch.randn(12, 16, 16)
    result = torch.compile(add, fullgraph=True)(x, gate, *terms)
    print(f"largest error: {(result - add(x, gate, *terms)).abs().max():.2g}")


if __name__ == "__main__":
    main()
