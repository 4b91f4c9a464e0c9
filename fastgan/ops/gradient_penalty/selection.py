"""One pass for logits that a function ``select=`` computes from the output of a discriminator.

The pass differentiates the tensors that the discriminator returned, because the loss uses these. Let w be the gradient
of the sum of the selected logits with respect to them: ones for a reshape, 1 / K for a mean over K patches. The sum of
the logits has the same gradient with respect to the input as <w, output> with a constant w.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from fastgan.ops.gradient_penalty.eligibility import Tracer
from fastgan.ops.gradient_penalty.outputs import Select, logits_of


class Selection(NamedTuple):
    logits: list[Tensor]
    outputs: list[Tensor]  # the tensors that one pass differentiates
    weights: list[Tensor] | None = None  # d(sum of the logits) / d(each of the outputs); None: ones
    obstacle: str | None = None


def selected(returned: Any, select: Select | None, samples: int, tracer: Tracer) -> Selection:
    """Select the logits, and trace a function that computes them."""
    if not callable(select):
        logits = logits_of(returned, select, samples)
        return Selection(logits, logits)
    outputs = {id(x): x for x in tree_leaves(returned) if isinstance(x, Tensor) and x.requires_grad}
    with tracer:
        aliases = {key: output.view_as(output) for key, output in outputs.items()}
        logits = logits_of(tree_map(lambda x: aliases.get(id(x), x), returned), select, samples)
    originals = {id(alias): outputs[key] for key, alias in aliases.items()}
    if all(id(logit) in originals or not logit.requires_grad for logit in logits):
        logits = [originals.get(id(logit), logit) for logit in logits]
        return Selection(logits, logits)
    return weighted(logits, [*outputs.values()], [*aliases.values()], tracer)


def weighted(logits: list[Tensor], outputs: Sequence[Tensor], aliases: Sequence[Tensor], tracer: Tracer) -> Selection:
    """Return the outputs that logits were computed from, and their weights.

    Args:
        logits: the selected logits.
        outputs: the tensors that the discriminator returned.
        aliases: a view of each, from which the logits were computed.
        tracer: the trace of all these calls.
    """
    ends = [logit for logit in logits if logit.requires_grad]
    obstacle = tracer.obstacle_between(aliases, ends)
    if obstacle is not None:
        return Selection(logits, logits, None, obstacle)
    ones = [torch.ones_like(end) for end in ends]
    weights = torch.autograd.grad(ends, aliases, ones, retain_graph=True, allow_unused=True)
    pairs = [(output, weight) for output, weight in zip(outputs, weights, strict=True) if weight is not None]
    return Selection(logits, [output for output, _ in pairs], [weight for _, weight in pairs])
