"""Every private name of PyTorch that fastgan's ops use: what for, and what happens in a release that lacks it.

PyTorch has no public way to ask these questions. A release that lacks a name without a substitute below fails when
fastgan is imported, with the name in the error.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch._C import _len_torch_dispatch_stack as count_dispatch_modes
from torch._C import _len_torch_function_stack as count_function_modes
from torch._compile import _disable_dynamo as apart_from_dynamo  # torch.compiler.disable imports the compiler at once
from torch._guards import TracingContext
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad
from torch.fx import _symbolic_trace
from torch.overrides import _get_current_function_mode_stack as function_modes
from torch.utils._python_dispatch import _get_current_dispatch_mode as dispatch_mode
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack as dispatch_modes

__all__ = [
    "DisableTorchFunction",
    "FunctionalTensor",
    "TracingContext",
    "apart_from_dynamo",
    "checkpoint_hook",
    "count_dispatch_modes",
    "count_function_modes",
    "current_node",
    "dispatch_mode",
    "dispatch_modes",
    "dynamo",
    "function_modes",
    "in_transform",
    "is_batched",
    "is_fx_symbolic_tracing",
    "is_jit_tracing",
    "keeps_graph",
    "will_execute",
]

# Compiled penalties: which trace is under way, and the tensors that a discriminator sees while its graph is made.
# torch.fx records calls too. torch 2.6 has the second name alone.
is_fx_symbolic_tracing: Callable[[], bool] = getattr(
    _symbolic_trace, "is_fx_symbolic_tracing", _symbolic_trace.is_fx_tracing
)
# The modes above tell who records calls, and their numbers whether it is worth a look.
# Calls of a discriminator are looked at without being seen by modes and subclasses.
DisableTorchFunction = torch._C.DisableTorchFunction
# Which node's backward runs now, whether the engine will run another, and whether it keeps the graph: a backward forms
# only the gradients that are asked for, and the one pass lets go what its caller lets go.
current_node = torch._C._current_autograd_node
will_execute = torch._C._will_engine_execute_node
keeps_graph = torch._C._autograd._get_current_graph_task_keep_graph


def is_jit_tracing() -> bool:
    """torch.jit.trace must see PyTorch's own operations. torch.jit.is_tracing imports more, and costs more a call."""
    return torch._C._get_tracing_state() is not None


def is_batched(tensor: Tensor) -> bool:
    """Whether a tensor stands for several gradients at once, which no kernel can read."""
    functorch = torch._C._functorch
    return functorch.is_legacy_batchedtensor(tensor) or functorch.is_batchedtensor(tensor)


def in_transform() -> bool:
    """Whether torch.func or forward-mode differentiation is under way, which see PyTorch's own operations alone."""
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def dynamo() -> tuple[Any, Any, Any]:
    """allow_in_graph, the settings and the tracer of torch.compile, which put a penalty into its graph.

    Importing them takes seconds, so this is called at first use.
    """
    from torch._dynamo import allow_in_graph, config
    from torch._dynamo.symbolic_convert import InstructionTranslator

    return allow_in_graph, config, InstructionTranslator


def _hook_on_top() -> object | None:
    hooks: Any = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks[0] if hooks is not None and getattr(hooks[0], "__module__", None) == "torch.utils.checkpoint" else None


def _frame_of_checkpoint() -> object | None:
    """Before torch 2.8, which has no name for the hooks: the innermost call of torch.utils.checkpoint on the stack."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__") != "torch.utils.checkpoint":
        frame = frame.f_back
    return frame


# An object of its own for each region of torch.utils.checkpoint; None outside of one. What is run again must save what
# was saved at first, so that nothing in it is rerouted.
checkpoint_hook = (
    _hook_on_top if hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks") else _frame_of_checkpoint
)
