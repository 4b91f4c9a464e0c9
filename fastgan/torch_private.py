"""All private names of PyTorch that fastgan's ops use, the purpose of each, and substitutes for releases that lack it.

PyTorch has no public equivalents. If a release lacks a name that has no substitute here, importing fastgan fails with
an error that contains the name.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import cache
from threading import Lock
from types import FrameType
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch._C import _len_torch_dispatch_stack as count_dispatch_modes
from torch._C import _len_torch_function_stack as count_function_modes
from torch._C._dynamo.eval_frame import get_eval_frame_callback
from torch._compile import _disable_dynamo as apart_from_dynamo  # torch.compiler.disable imports the compiler at once
from torch._guards import TracingContext
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.autograd.graph import _engine_run_backward as run_backward
from torch.fx import _symbolic_trace
from torch.nn.modules import module as module_hooks
from torch.overrides import _get_current_function_mode_stack as function_modes
from torch.overrides import has_torch_function
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack as dispatch_modes
from torch.utils.hooks import RemovableHandle

__all__ = [
    "DisableTorchFunction",
    "FunctionalTensor",
    "RemovableHandle",
    "TracingContext",
    "Uncompiled",
    "apart_from_dynamo",
    "apply",
    "attention_on_cpu",
    "attention_on_cpu_backward",
    "checkpoint_hook",
    "clamp_passes_at_bound",
    "count_dispatch_modes",
    "count_function_modes",
    "count_hooks",
    "count_references",
    "current_backward",
    "current_node",
    "dispatch_modes",
    "dynamo",
    "function_modes",
    "gradient_edge",
    "gradients",
    "gradients_without_graph",
    "has_saving_hook",
    "has_torch_function",
    "in_transform",
    "intercept_autograd_grad",
    "is_batched",
    "is_exported_or_symbolic",
    "jit_trace",
    "keep_graph_whole",
    "keeps_graph",
    "rebind",
    "run_backward",
    "safe_softmax",
    "shape_of_result",
    "will_execute",
]

# Compiled penalties need to know which trace is active and which tensors a discriminator sees while its graph is
# recorded. torch.fx records calls too. torch 2.6 has only the second name.
is_fx_symbolic_tracing: Callable[[], bool] = getattr(
    _symbolic_trace, "is_fx_symbolic_tracing", _symbolic_trace.is_fx_tracing
)
# The imported modes show what records calls. Their counts are cheaper to check first. DisableTorchFunction hides the
# tracer's own operations from modes and subclasses.
DisableTorchFunction = torch._C.DisableTorchFunction
# The node whose backward is running, whether the engine will run a given node, and whether it keeps the graph. With
# these, a backward computes only requested gradients, and the one pass frees its graph if the caller's backward does.
current_node = torch._C._current_autograd_node
will_execute = torch._C._will_engine_execute_node
# A number for each run of a backward. A penalty that FSDP shards looks once in each for gradients that FSDP keeps.
current_backward = torch._C._current_graph_task_id
keeps_graph = torch._C._autograd._get_current_graph_task_keep_graph

# The kernels behind F.scaled_dot_product_attention on a CPU. The first also returns the log-sum-exp, which the public
# function hides, and the second derivative needs it.
attention_on_cpu: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
attention_on_cpu_backward: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

# Softmax that is 0 in a row of -inf, as in PyTorch's plain form of attention.
safe_softmax: Any = torch._safe_softmax


def is_exported_or_symbolic() -> bool:
    """Return whether torch.export or torch.fx records calls. Reading their flags takes less time than calling both."""
    if getattr(torch.compiler, "_is_exporting_flag", True) and _is_exporting():
        return True
    return getattr(_symbolic_trace, "_is_fx_tracing_flag", True) and is_fx_symbolic_tracing()  # 2.14 has no such flag


_is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", lambda: False)  # torch 2.7


# None unless torch.jit.trace is active. torch.jit.is_tracing imports more modules and is slower.
jit_trace: Callable[[], object | None] = torch._C._get_tracing_state


def is_batched(*tensors: Tensor) -> bool:
    """Return whether any of these tensors is batched by vmap. Kernels cannot read such tensors."""
    functorch = torch._C._functorch
    return any(map(functorch.is_legacy_batchedtensor, tensors)) or any(map(functorch.is_batchedtensor, tensors))


# At a bound, clamp has the gradient 1 before torch 2.14, then 0 for a number and 1/2 for a tensor.
clamp_passes_at_bound = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 14)


def in_transform() -> bool:
    """Return whether torch.func or forward-mode differentiation is active. Both need PyTorch's own operations."""
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def dynamo() -> tuple[Any, Any, Any]:
    """Return allow_in_graph, the settings and the tracer of torch.compile.

    Importing them takes seconds, so this is called at the first use.
    """
    from torch._dynamo import allow_in_graph, config
    from torch._dynamo.symbolic_convert import InstructionTranslator

    return allow_in_graph, config, InstructionTranslator


_COMPILER = "torch._dynamo.eval_frame"


class Uncompiled:
    """Run compiled functions uncompiled while at least one thread is inside this context.

    The compiler's stance is global to the process, so the last thread to leave restores it. torch.compiler.set_stance
    makes more calls, which a small penalty notices. If the compiler was never imported, nothing is compiled, and
    importing it would take a second.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._inside = 0
        self._compiler: Any = None  # None: never imported when the first thread entered
        self._stance: Any = None  # before that

    def __enter__(self) -> None:
        with self._lock:
            if self._compiler is None:
                compiler: Any = sys.modules.get(_COMPILER)
                if compiler is not None:
                    if get_eval_frame_callback():  # None or False outside of compiled functions
                        raise RuntimeError("a penalty that is not compiled cannot run inside a compiled function")
                    self._stance, compiler._stance = compiler._stance, _eager_stance()
                    self._compiler = compiler
            self._inside += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0 and self._compiler is not None:
                self._compiler._stance, self._compiler, self._stance = self._stance, None, None


@cache
def _eager_stance() -> Any:
    from torch._dynamo.eval_frame import DynamoStance

    return DynamoStance("force_eager")


def gradients(
    outputs: Sequence[Tensor],
    inputs: Sequence[Any],
    factors: Sequence[Tensor],
    *,
    create_graph: bool = True,
    retain_graph: bool = True,
) -> Sequence[Tensor | None]:
    """Call torch.autograd.grad with ``allow_unused=True``. The inputs are tensors or gradient edges.

    Plain tensors go straight to the engine. The checks of torch.autograd.grad take as long as a small layer.
    """
    if has_torch_function((*outputs, *inputs, *factors)):
        return torch.autograd.grad(outputs, inputs, factors, retain_graph, create_graph, allow_unused=True)
    results: Sequence[Tensor | None] = run_backward(
        tuple(outputs), tuple(factors), retain_graph, create_graph, tuple(inputs), True, accumulate_grad=False
    )
    return results


def gradient_edge(result: Tensor) -> GradientEdge:
    """Call torch.autograd.graph.get_gradient_edge for the result of a function.

    This makes fewer calls, because the edge does not own the node of a custom Function. Use it only while a graph does.
    """
    node = result.grad_fn
    return get_gradient_edge(result) if node is None else GradientEdge(node, result.output_nr)


def gradients_without_graph(output: Tensor, inputs: Sequence[Any]) -> Sequence[Any]:
    """Return the gradients of the sum of the output at tensors or gradient edges, and keep the graph of the output."""
    return gradients([output], inputs, [torch.ones_like(output)], create_graph=False)


def shape_of_result(node: Any, index: int = 0) -> list[int]:
    """Return the shape of the tensor that the function of this node returned."""
    shape: list[int] = node._input_metadata[index].shape
    return shape


def has_saving_hook(node: Any, saved: str) -> bool:
    """Return whether a hook unpacks this saved tensor of a node, such as that of a checkpoint."""
    return getattr(getattr(node, f"_raw{saved}"), "unpack_hook", None) is not None


def count_hooks() -> int:
    """Return the number of hooks that this process has registered. A node of a graph does not show its hooks."""
    return RemovableHandle.next_id


def remove_hook(handle: RemovableHandle) -> None:
    """Remove a hook of all modules, and its mark for keyword arguments, which PyTorch keeps."""
    handle.remove()
    module_hooks._global_forward_hooks_with_kwargs.pop(handle.id, None)


def count_references(result: ref[Tensor]) -> int:
    """Return the number of Python objects that refer to a tensor that requires a gradient.

    The graph may refer to it too. Call this while torch function modes are disabled.
    """
    references, by_graph = _references(result)
    return references - _unstored()[by_graph]


def _references(result: ref[Tensor]) -> tuple[int, bool]:
    """Return the count of references to a Python object, and whether C++ refers to the tensor."""
    tensor: Any = result()
    if tensor is None or not tensor.requires_grad:
        return 0, False
    same = tensor.requires_grad_()  # returns the tensor; before torch 2.10, Python takes over the reference of C++ here
    return sys.getrefcount(same), tensor._use_count() > 1


@cache
def _unstored() -> tuple[int, int]:
    """Return the counts of references to a tensor to which nothing in Python refers; the second one is in a graph."""
    with torch.enable_grad():
        leaf = torch.ones(1, requires_grad=True)
        alone, stored = leaf * 1, leaf * 1
        product = stored * stored
    of_graph, of_one = ref(stored), ref(alone)
    del stored
    counts = _references(of_one)[0] - 1, _references(of_graph)[0]
    del product
    return counts


def intercept_autograd_grad() -> None:
    """Let torch.compile pass calls of torch.autograd.grad to torch function modes, as PyTorch does."""
    from torch._dynamo.variables.torch import get_overridable_functions

    get_overridable_functions().add(torch.autograd.grad)


def rebind(variable: str, other: str) -> None:
    """Let a variable of the frame that torch.compile traces, and all its aliases, denote the tensor of another one.

    In the graph, a tensor cannot become a leaf in place. Code that called ``x.requires_grad_()`` goes on with x.
    """
    _, _, translator = dynamo()
    frame = translator.current_tx().output.current_tx
    old, new = (frame.symbolic_locals[name].realize() for name in (variable, other))
    old.proxy, old.requires_grad = new.proxy, new.requires_grad


def keep_graph_whole() -> None:
    """Do not let DistributedDataParallel split the graph that torch.compile traces into one for each of its buckets."""
    _, _, translator = dynamo()
    optimizer: Any = getattr(translator.current_tx().output.compiler_fn, "__self__", None)
    if hasattr(optimizer, "first_bucket_cap"):
        optimizer.first_bucket_cap = optimizer.bucket_bytes_cap = float("inf")


def finish_graph(function: Callable[[Any], None]) -> None:
    """Call a function with the graph that torch.compile traces, before it is compiled."""
    _, _, translator = dynamo()
    output: Any = translator.current_tx().output.root_tx.output
    if function not in output.register_finalizer_fns:
        output.add_graph_finalizer(function)


def apply(function: Any, *args: Any) -> Any:
    """Call ``function.apply(*args)`` of an autograd.Function, in eager mode without the steps that transforms need."""
    if torch.compiler.is_dynamo_compiling() or torch._C._are_functorch_transforms_active():
        return function.apply(*args)
    return super(torch.autograd.Function, function).apply(*args)


def _hook_on_top() -> object | None:
    hooks: Any = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks[0] if hooks is not None and getattr(hooks[0], "__module__", None) == "torch.utils.checkpoint" else None


def _frame_of_checkpoint() -> object | None:
    """Return the innermost call of torch.utils.checkpoint on the stack. torch before 2.8 cannot return the hooks."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__") != "torch.utils.checkpoint":
        frame = frame.f_back
    return frame


# Returns a distinct object for each region of torch.utils.checkpoint, and None outside. The second run of a region must
# save the same tensors as the first, so nothing inside is rerouted.
checkpoint_hook = (
    _hook_on_top if hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks") else _frame_of_checkpoint
)
