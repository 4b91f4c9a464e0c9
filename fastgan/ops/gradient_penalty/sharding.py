"""Discriminators whose weights a penalty would not find where its forward left them."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from torch import distributed, nn
from torch.autograd.graph import Node

MESSAGE = (
    "a gradient penalty differentiates the weights after FSDP has freed them: "
    "wrap the discriminator in DistributedDataParallel, and shard the generator alone"
)


def may_be_sharded() -> bool:
    """Whether anything of this process can be."""
    return "torch.distributed.fsdp" in sys.modules and distributed.is_initialized()


may_be_sharded._dynamo_marked_constant = True  # type: ignore[attr-defined]


def refuse_sharded(discriminator: Any) -> None:
    """Raise for one that FSDP shards.

    FSDP frees the gathered weights once the first backward is through, and gathers them again, and later reduces their
    gradients, only where a backward reaches an output of the forward. That of a penalty has no path there: the memory
    of the weights would be read after it is gone.
    """
    if not may_be_sharded() or not isinstance(discriminator, nn.Module):
        return
    fsdp = sys.modules["torch.distributed.fsdp"]
    kinds = tuple(getattr(fsdp, name) for name in ("FSDPModule", "FullyShardedDataParallel") if hasattr(fsdp, name))
    if any(isinstance(module, kinds) for module in discriminator.modules()):
        raise RuntimeError(MESSAGE)


def refuse_sharded_graph(path: Iterable[Node]) -> None:
    """Likewise where the logits alone, or a function around the discriminator, are known.

    Args:
        path: the nodes between logits and input. FSDP2 puts one of its own before what it shards.
    """
    if any(type(node).__name__ == "RegisterPostBackwardFunctionBackward" for node in path):
        raise RuntimeError(MESSAGE)
