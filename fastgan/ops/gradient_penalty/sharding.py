"""Discriminators whose weights are sharded.

FSDP2's hooks gather the weights for a forward and free them after the first backward. A penalty differentiates twice,
so its forward bypasses the hooks. A module that FSDP2 manages gathers its weights by a differentiable function
(shards.py), runs, and frees them. FSDP1 and tensor parallelism raise an error.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial
from threading import Lock
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.autograd.graph import Node
from torch.overrides import TorchFunctionMode

from fastgan import torch_private
from fastgan.ops.gradient_penalty.kept import Accumulation, groups_of
from fastgan.ops.gradient_penalty.shards import Sharded, Weights
from fastgan.ops.library import checkpointed_region

_CALLED_OUTSIDE = (
    "these logits were computed with FSDP's own hooks, which free the weights before a gradient penalty differentiates "
    "them. Pass the discriminator itself, not one of its methods, to gradient_penalty or logits_and_penalty, which "
    "bypass the hooks. penalty_from_logits is not supported with FSDP"
)
_FSDP1 = (
    "FullyShardedDataParallel (FSDP1) frees the weights before a gradient penalty differentiates them: shard the "
    "discriminator with torch.distributed.fsdp.fully_shard (FSDP2), or wrap it in DistributedDataParallel"
)
_TENSOR_PARALLEL = (
    "the discriminator's parameters are DTensors that FSDP2 did not create, as in tensor parallelism, which gradient "
    "penalties do not support: shard it only with torch.distributed.fsdp.fully_shard, or wrap it in "
    "DistributedDataParallel"
)
_CHECKPOINTED = (
    "a gradient penalty of a sharded discriminator does not support torch.utils.checkpoint, whose second forward runs "
    "after the weights are freed: remove the checkpoint. The weights are gathered layer by layer without it"
)
_HOOKS = "torch.distributed.fsdp._fully_shard"  # the module that defines FSDP2's hooks


class ShardingNotSupported(RuntimeError):
    """The discriminator is sharded in a way that penalties do not support."""


def may_be_sharded() -> bool:
    """Return whether this process can hold sharded modules."""
    return "torch.distributed.tensor" in sys.modules and distributed.is_initialized()


may_be_sharded._dynamo_marked_constant = True  # type: ignore[attr-defined]


def refuse_sharded_graph(path: Iterable[Node]) -> None:
    """Raise if FSDP's own hooks or tensor parallelism took part in the forward.

    Args:
        path: the nodes between the logits and the inputs. FSDP2 adds a node of its own for each module that it shards.
            Tensor parallelism adds nodes that convert tensors to DTensors and back.
    """
    if not may_be_sharded():
        return
    names = {type(node).__name__ for node in path}
    if "RegisterPostBackwardFunctionBackward" in names:
        raise ShardingNotSupported(_CALLED_OUTSIDE)
    if not names.isdisjoint({"_ToTorchTensorBackward", "_FromTorchTensorBackward"}):
        raise ShardingNotSupported(_TENSOR_PARALLEL)


def gathering(discriminator: Any) -> AbstractContextManager[None]:
    """Inside this context, modules that FSDP2 shards gather their weights. Run the forward and first backward in it.

    Raises:
        RuntimeError: the discriminator, or a module called inside, is sharded in a way that penalties do not support.
    """
    if not may_be_sharded():
        return nullcontext()
    if isinstance(discriminator, nn.Module):
        _refuse(discriminator)
    return _gathering()


def _refuse(discriminator: nn.Module) -> None:
    from torch.distributed.tensor import DTensor

    managed = {id(p) for module in discriminator.modules() for group in _groups(module) for p in _registered(group)}
    if any(isinstance(p, DTensor) and id(p) not in managed for p in discriminator.parameters()):
        raise ShardingNotSupported(_TENSOR_PARALLEL)


def _registered(group: Any) -> Iterator[Tensor | None]:
    """Return the parameters of a group that its modules hold now."""
    return (module._parameters.get(name) for p in group.fsdp_params for module, name in _owners(p))


_weights: ContextVar[Weights | None] = ContextVar("fastgan_gathered_weights", default=None)


@contextmanager
def _gathering() -> Iterator[None]:
    weights = Weights()
    token = _weights.set(weights)
    try:
        with _calls, weights.regathered():
            yield
    finally:
        _weights.reset(token)


class _Calls:
    """Call FSDP's modules by the functions below while at least one thread is inside this context."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._inside = 0

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                for cls, call in _fsdp_calls():
                    cls.__call__ = call

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                for cls, _ in _fsdp_calls():
                    del cls.__call__


def _fsdp_calls() -> list[tuple[Any, Any]]:
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    return [(FSDPModule, _call_gathered), (FullyShardedDataParallel, _call_refused)]


_calls = _Calls()


def _call_refused(module: Any, *args: Any, **kwargs: Any) -> Any:
    from torch.distributed.fsdp import FullyShardedDataParallel

    if _weights.get() is not None:
        raise ShardingNotSupported(_FSDP1)
    return super(FullyShardedDataParallel, module).__call__(*args, **kwargs)


def _call_gathered(module: Any, *args: Any, **kwargs: Any) -> Any:
    from torch.distributed.fsdp import FSDPModule

    call = super(FSDPModule, module).__call__
    weights = _weights.get()
    if weights is None or torch_private.in_transform():
        return call(*args, **kwargs)
    with _without_hooks(module), _NoCheckpoint(), ExitStack() as stack:
        for group in _groups(module):
            _check(group)
            below = set(module.modules())
            for fsdp_param in group.fsdp_params:
                owners = [owner for owner in _owners(fsdp_param) if owner[0] in below]
                if owners:
                    stack.enter_context(_in_place(owners, weights.gather(_sharded(group, fsdp_param))))
        return call(*args, **kwargs)


class _NoCheckpoint(TorchFunctionMode):
    """Raise in checkpointed regions. Their second forward would find shards instead of weights."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if checkpointed_region() is not None:
            raise ShardingNotSupported(_CHECKPOINTED)
        return func(*args, **(kwargs or {}))


@contextmanager
def _in_place(owners: list[tuple[nn.Module, str]], weight: Tensor) -> Iterator[None]:
    """Replace a parameter of these modules by the gathered weight."""
    before = [module._parameters[name] for module, name in owners]
    try:
        for module, name in owners:
            _set(module, name, weight)
        yield
    finally:
        for (module, name), parameter in zip(owners, before, strict=True):
            _set(module, name, parameter)


def _set(module: nn.Module, name: str, weight: Tensor | None) -> None:
    module._parameters[name] = weight  # type: ignore[assignment]
    if isinstance(module, nn.RNNBase):  # it reads the weights from a list
        module._flat_weights = [getattr(module, each, None) for each in module._flat_weights_names]


@contextmanager
def _without_hooks(module: nn.Module) -> Iterator[None]:
    """Replace FSDP's hooks around this module's forward by the casts that they perform."""
    policy = _state(module)._mp_policy
    device = _state(module)._device
    before, after = module._forward_pre_hooks, module._forward_hooks
    dtype = policy.param_dtype if policy.cast_forward_inputs else None

    def given(_: nn.Module, args: Any, kwargs: Any) -> Any:
        to = partial(_cast, dtype, None if device.type == "cpu" else device)
        return _on_tensors(to, args), _on_tensors(to, kwargs)

    def returned(_: nn.Module, args: Any, output: Any) -> Any:
        return output if policy.output_dtype is None else _on_tensors(partial(_cast, policy.output_dtype, None), output)

    stands_for = {key: hook for key, hook in (*before.items(), *after.items()) if _is_of_fsdp(hook)}
    for hooks, replacement in ((before, given), (after, returned)):
        hooks.update({key: replacement for key in hooks if key in stands_for})
    try:
        yield
    finally:
        for hooks in (before, after):
            hooks.update({key: stands_for[key] for key in hooks if key in stands_for})


def _is_of_fsdp(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith(_HOOKS)


def _cast(dtype: torch.dtype | None, device: torch.device | None, tensor: Tensor) -> Tensor:
    if device is not None and tensor.device.type != device.type:
        tensor = tensor.to(device)
    return tensor if dtype is None or not tensor.is_floating_point() else tensor.to(dtype)


def _on_tensors(change: Callable[[Tensor], Tensor], values: Any) -> Any:
    from torch.distributed.utils import _apply_to_tensors

    return _apply_to_tensors(change, values)


def _state(module: nn.Module) -> Any:
    """Return FSDP2's state of a module that it manages."""
    return module._get_fsdp_state()  # type: ignore[operator]


def _groups(module: nn.Module) -> list[Any]:
    """Return the groups of parameters that FSDP2 gathers when this module is called. Other modules have none."""
    return groups_of(_state(module)) if hasattr(module, "_get_fsdp_state") else []


def dtypes_by_policy(modules: Iterable[nn.Module]) -> set[torch.dtype]:
    """Return the dtypes in which FSDP2's policies let these modules compute."""
    dtypes = {group.mp_policy.param_dtype for module in modules for group in _groups(module)}
    return dtypes - {None}


def _owners(fsdp_param: Any) -> list[tuple[nn.Module, str]]:
    """Return the modules that hold this parameter, with its name in each."""
    info = fsdp_param._module_info
    shared = zip(info.shared_modules, info.shared_param_names, strict=True)
    return [(info.module, info.param_name), *shared]


def _check(group: Any) -> None:
    if any(fsdp_param.is_dtensor for fsdp_param in group.fsdp_params):
        raise ShardingNotSupported(_TENSOR_PARALLEL)
    if getattr(group, "_all_reduce_hook", None) is not None:
        raise ShardingNotSupported(
            "a gradient penalty does not run the hook of set_all_reduce_hook: instead, pass fully_shard a "
            "two-dimensional mesh whose first dimension is replicated"
        )


def _sharded(group: Any, fsdp_param: Any) -> Sharded:
    from torch.distributed.tensor import DTensor

    module, name = _owners(fsdp_param)[0]
    current = module._parameters[name]
    # Until FSDP's first forward, the user may replace the sharded parameters of a module.
    state = _state(group.modules[0])
    started = state._is_root is not None
    parameter = fsdp_param.sharded_param if started or not isinstance(current, DTensor) else current
    if type(parameter.to_local()) is not Tensor:
        kind = type(parameter.to_local()).__name__
        raise ShardingNotSupported(
            f"a gradient penalty can only gather plain tensors, but the shard of {name!r} is a {kind}"
        )
    policy, floating = group.mp_policy, parameter.is_floating_point()
    comm = group.comm_ctx
    streams = [getattr(comm, each, None) for each in ("reduce_scatter_stream", "all_reduce_stream")]
    return Sharded(
        parameter,
        group.device,
        policy.param_dtype if floating and policy.param_dtype is not None else parameter.dtype,
        policy.reduce_dtype,
        group.gradient_divide_factor or parameter.device_mesh.size(),
        tuple(stream for stream in streams if isinstance(stream, torch.cuda.Stream)),
        keeps=group.post_forward_mesh_info is None,
        accumulation=Accumulation(state, group, fsdp_param),
    )
