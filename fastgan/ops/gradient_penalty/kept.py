"""Gradients that FSDP2 keeps between micro-batches.

After ``set_requires_gradient_sync(False)``, FSDP keeps whole gradients, and the next backward with synchronization
reduces their sum. After ``set_requires_all_reduce(False)`` on a mesh with replicas, it keeps sums over the ranks of one
replica. FSDP does all this in hooks of its own forwards, which a penalty bypasses. So a penalty adds its gradients to
those that FSDP keeps, and its backward ends with FSDP's own callback, which reduces them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastgan import torch_private


def groups_of(state: Any) -> list[Any]:
    """Return the groups of parameters that one state of FSDP2 gathers together."""
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    return [] if state._fsdp_param_group is None else [state._fsdp_param_group]  # torch 2.6 to 2.10


@dataclass(frozen=True, eq=False)
class Accumulation:
    """The gradient of one parameter that FSDP keeps."""

    state: Any
    group: Any
    fsdp_param: Any

    def take(self, grad: Tensor) -> bool:
        """Add to the kept gradient, or return False: the caller must reduce this gradient."""
        if self.group.reduce_grads:
            _reduce_at_end(self.state)
            if not _keeps(self.group):
                return False
        if torch.is_grad_enabled() or not _has_run(self.group):
            return False
        if self.fsdp_param.unsharded_accumulated_grad is None:
            _keep_all(self.group)
        self.fsdp_param.unsharded_accumulated_grad += grad
        return True


def _has_run(group: Any) -> bool:
    """Return whether FSDP's own forward has run. Before, FSDP has no place for gradients."""
    return all(hasattr(fsdp_param, "_unsharded_param") for fsdp_param in group.fsdp_params)


def _keeps(group: Any) -> bool:
    return any(
        fsdp_param.unsharded_accumulated_grad is not None or fsdp_param._unsharded_param.grad is not None
        for fsdp_param in group.fsdp_params
        if hasattr(fsdp_param, "_unsharded_param")
    )


def _keep_all(group: Any) -> None:
    """Keep a gradient of each parameter. FSDP reduces those of a group together, and needs one dtype."""
    for fsdp_param in group.fsdp_params:
        if fsdp_param.sharded_param.requires_grad:
            if fsdp_param.unsharded_accumulated_grad is None:
                zeros = torch.zeros_like(fsdp_param._unsharded_param, dtype=fsdp_param.reduce_dtype)
                fsdp_param.unsharded_accumulated_grad = zeros
            fsdp_param.accumulate_unsharded_grad_if_needed()


def _reduce_at_end(state: Any) -> None:
    """Let FSDP reduce all that it keeps at the end of this backward, as it does if its own forwards take part."""
    context, backward = state._state_ctx, torch_private.current_backward()
    if context.post_backward_final_callback_queued or getattr(context, "_fastgan_backward", None) == backward:
        return
    context._fastgan_backward = backward  # one look in each backward is enough
    groups = [group for each in context.all_states for group in groups_of(each) if group.reduce_grads]
    for group in groups:
        if group.all_reduce_grads and getattr(group, "_partial_reduce_output", None) is not None:
            _keep_all(group)  # FSDP adds the partial sums when it reduces gradients
    # A forward without gradients leaves the root's weights whole, and only a backward frees them. They must not outlive
    # the optimizer's step.
    if any(_keeps(group) or group.is_unsharded for group in groups):
        state._register_root_post_backward_final_callback()
