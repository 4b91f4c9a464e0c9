"""Compute all spectrally normalized weights of a model in one call per forward."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import accumulate
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm as TorchHook

from fastgan import backends
from fastgan.nn.utils.ready import (
    Vectors,
    copyable,
    discard,
    is_recomputing,
    put,
    read,
    ready,
    thread_and_region,
)
from fastgan.nn.utils.spectral_norm import SpectralNorm, adapt, needs_pytorch
from fastgan.ops.spectral_norm import fits, normalize

M = TypeVar("M", bound=nn.Module)
T = TypeVar("T")


def fuse_spectral_norm(model: M) -> M:
    """Compute all spectrally normalized weights of a model together, once at the start of each forward.

    The function finds fastgan's and PyTorch's parametrizations and PyTorch's older forward hooks
    (``torch.nn.utils.spectral_norm``) in ``model`` and all its submodules, and changes them in place. Subclasses of
    these keep their own code. Call the function again after adding layers. Apply DistributedDataParallel, FSDP or
    torch.compile afterwards. A spectral norm can be removed in the usual way.

    The state_dict, and the shapes and dtypes of the results, stay the same. Each layer's u and v are updated once per
    read of its weight, as in PyTorch. A layer that a forward skips keeps its u and v. In these cases a layer computes
    its own weight:

    - from its second call in the same forward on
    - if a submodule is called outside of the model's forward
    - if something else has changed or replaced the weight (pruning, a second parametrization, FSDP's shards)
    - inside a transform of torch.func, and under a tracer
    - if FSDP shards the layers one by one; each layer normalizes its weight when FSDP has gathered it

    Two things differ from PyTorch. When activation checkpointing recomputes a forward, u and v are not updated again.
    And copies of a model (``copy.deepcopy``, ``pickle``) hold the weights of the older hooks without their graph.

    Order of derivative: two, in the weights. A third derivative raises; ``use_backend("reference")`` has every order.

    Source: Miyato et al., Spectral Normalization for Generative Adversarial Networks (2018).

    ```python
    import torch
    import fastgan

    model = torch.nn.Sequential(
        fastgan.nn.utils.spectral_norm(torch.nn.Linear(8, 16)),
        torch.nn.ReLU(),
        fastgan.nn.utils.spectral_norm(torch.nn.Linear(16, 1)),
    )
    fastgan.nn.utils.fuse_spectral_norm(model)
    y = model(torch.randn(4, 8))
    ```

    Args:
        model: a module with spectrally normalized weights. It is changed in place.

    Returns:
        The model itself.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: the model has no spectrally normalized weight.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    members: list[_Member] = []
    for module in model.modules():
        members += [*_parametrizations(module), *_hooks(module)]
    if not members:
        raise ValueError(f"{type(model).__name__} has no spectrally normalized weight")
    for module in model.modules():  # a submodule fused earlier would iterate a second time in the model's forward
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [k for k, hook in hooks.items() if isinstance(getattr(hook, "__self__", None), _Fused)]:
                del hooks[key]
    fused = _Fused(members)
    model.register_forward_pre_hook(fused.before)
    model.register_forward_hook(fused.after, always_call=True)
    return model


class Operands(NamedTuple):
    weight: Tensor
    u: Tensor
    v: Tensor
    dim: int


class Settings(NamedTuple):
    n_power_iterations: int
    eps: float
    training: bool
    v_first: bool


class _Parametrized:
    """A weight normalized by a parametrization."""

    def __init__(self, module: nn.Module, name: str, tensors: parametrize.ParametrizationList) -> None:
        self.module, self.name, self.tensors = module, name, tensors
        self.norm = _set_class(SpectralNorm, tensors[0])

    def look(self) -> tuple[Operands, Settings] | None:
        """Return the operands and the settings. Return None if a read of the weight does more than normalize it."""
        # Read nn.Module's dictionaries directly. On a small model, attribute look-ups cost as much as the kernel.
        norm, tensors = self.norm, self.tensors
        lists = self.module._modules.get("parametrizations")
        original = tensors._parameters.get("original")  # pruning and FSDP1 replace it by a plain tensor
        if (
            original is None
            or lists is None
            or lists._modules.get(self.name) is not tensors
            or len(tensors._modules) > 1
            or tensors._modules.get("0") is not norm
            or any((tensors._forward_pre_hooks, tensors._forward_hooks, norm._forward_pre_hooks, norm._forward_hooks))
            or (parametrize._cache_enabled and parametrize._cache.get((id(self.module), self.name)) is not None)
        ):
            return None
        u, v = norm._buffers["_u"], norm._buffers["_v"]
        settings = Settings(norm.n_power_iterations, norm.eps, norm.training, v_first=False)
        return Operands(original, cast(Tensor, u), cast(Tensor, v), norm.dim), settings

    def original(self) -> Tensor:
        return cast(Tensor, self.tensors._parameters["original"])

    def clear(self) -> bool:
        """Remove the prepared weight. Return whether a training forward has not read it."""
        return discard(self.module, self.name)

    @property
    def is_idle(self) -> bool:
        return self.norm.is_idle

    def set_idle(self) -> None:
        self.norm.is_idle = True


class _Hook(TorchHook):
    """PyTorch's older hook, which sets the weight at its module's forward. It uses the prepared weight, if any."""

    module: nn.Module
    plain: Tensor | None = None  # the attribute before a tracer or a transform of torch.func replaced it
    is_idle = False

    def __call__(self, module: nn.Module, inputs: Any) -> None:
        if module is not self.module:  # the module is a replica made by torch.nn.DataParallel
            super().__call__(module, inputs)
        elif not backends.is_plain():
            if self.plain is None:
                self.plain = getattr(module, self.name)
            super().__call__(module, inputs)
        else:
            weight = read(module, self.name, module._parameters.get(self.name + "_orig"), module.training)
            if weight is None:
                weight = self._normalized()
            setattr(module, self.name, copyable(weight))

    def _normalized(self) -> Tensor:
        if self.is_idle and not torch.compiler.is_compiling():
            del self.is_idle
        (weight, u, v, dim), settings = self._operands(), self._settings()
        if needs_pytorch(weight, u, v, dim):
            return self.compute_weight(self.module, do_power_iteration=settings.training)
        n = settings.n_power_iterations if settings.training and not is_recomputing() else 0
        (normalized,) = normalize([weight], [u], [v], [dim], n, settings.eps, v_first=True)
        return _like(self.original(), normalized)

    def look(self) -> tuple[Operands, Settings] | None:
        is_registered = any(hook is self for hook in self.module._forward_pre_hooks.values())
        if not is_registered or self.module._parameters.get(self.name + "_orig") is None:
            return None
        return self._operands(), self._settings()

    def original(self) -> Tensor:
        return cast(Tensor, getattr(self.module, self.name + "_orig"))

    def clear(self) -> bool:
        if self.plain is not None:  # a transform's tensor is invalid after the transform: it cannot be copied or saved
            setattr(self.module, self.name, self.plain)
            self.plain = None
        return discard(self.module, self.name)

    def set_idle(self) -> None:
        self.is_idle = True

    def _operands(self) -> Operands:
        weight, u, v = (getattr(self.module, self.name + suffix) for suffix in ("_orig", "_u", "_v"))
        return Operands(weight if weight.ndim > 1 else weight[:, None], u, v, self.dim)

    def _settings(self) -> Settings:
        return Settings(self.n_power_iterations, self.eps, self.module.training, v_first=True)


_Member = _Parametrized | _Hook


class _Fused:
    """The forward hooks of a model that compute all its normalized weights together."""

    def __init__(self, members: list[_Member]) -> None:
        self.members = members

    def before(self, model: nn.Module, inputs: Any) -> None:
        if _is_replica(model):
            return  # each module of a replica normalizes its own weight
        for member in self.members:  # weights left by an interrupted forward, or by one that encloses this forward
            discard(member.module, member.name, any_thread=True)
        if not backends.is_plain():
            return
        # One call handles all members with the same settings, dtype and device.
        groups: dict[Any, list[tuple[_Member, Operands]]] = {}
        for member in self.members:
            found = None if member.is_idle else member.look()
            if found is not None:
                operands, settings = found
                key = settings, operands.weight.dtype, operands.weight.device
                groups.setdefault(key, []).append((member, operands))
        for (settings, _, _), group in groups.items():
            self._compute(settings, group)

    def _compute(self, settings: Settings, group: list[tuple[_Member, Operands]]) -> None:
        group = _fitting(group)
        if not group:
            return
        members, operands = zip(*group, strict=True)
        weights, us, vs, dims = zip(*operands, strict=True)
        n = settings.n_power_iterations if settings.training and not is_recomputing() else 0
        vectors = _vectors(us, vs) if n else [None] * len(us)
        normalized = normalize(weights, us, vs, dims, n, settings.eps, settings.v_first)
        thread, region = thread_and_region()
        for member, weight, renewed in zip(members, normalized, vectors, strict=True):
            original = member.original()
            made = ready(_like(original, weight), original, settings.training, thread, region, renewed)
            put(member.module, member.name, made)

    def after(self, model: nn.Module, inputs: Any, output: Any) -> None:
        if _is_replica(model):
            return
        for member in self.members:
            if member.clear() and not torch.compiler.is_compiling():
                member.set_idle()  # the member rejoins the call after a forward that reads it


def _fitting(group: list[tuple[_Member, Operands]]) -> list[tuple[_Member, Operands]]:
    """Return the members that one call can handle, usually all of them."""
    weights, us, vs, dims = zip(*[operands for _, operands in group], strict=True)
    if not fits(weights, us, vs, dims):
        group = [(member, o) for member, o in group if fits([o.weight], [o.u], [o.v], [o.dim])]
    # If two weights share vectors, a read of one updates the start values of the other.
    if torch.compiler.is_dynamo_compiling():  # in torch 2.11, it cannot trace id() of a tensor that the graph made
        return [(member, o) for member, o in group if sum(o.u is other.u for _, other in group) == 1]
    owners = Counter(id(operands.u) for _, operands in group)
    if len(owners) < len(group):
        group = [(member, o) for member, o in group if owners[id(o.u)] == 1]
    return group


def _like(original: Tensor, weight: Tensor) -> Tensor:
    """View the weight in the shape of its original, which may be a vector that was viewed as a matrix."""
    return weight if weight.ndim == original.ndim else weight.view_as(original)


def _vectors(us: tuple[Tensor, ...], vs: tuple[Tensor, ...]) -> list[Vectors]:
    """Pair up all u and v, with a copy of their current values."""
    *starts, _ = accumulate([0, *map(len, us), *map(len, vs)])
    before = torch.cat([*us, *vs])
    return [
        Vectors(u, v, before, u_at, v_at)
        for u, v, u_at, v_at in zip(us, vs, starts[: len(us)], starts[len(us) :], strict=True)
    ]


def _parametrizations(module: nn.Module) -> Iterator[_Parametrized]:
    if not parametrize.is_parametrized(module):
        return
    for name, tensors in cast(nn.ModuleDict, module.parametrizations).items():
        tensors = cast(parametrize.ParametrizationList, tensors)
        # With several parametrizations, only the first reads the original and only the last returns the weight.
        if len(tensors) == 1 and _is_known(tensors[0], _SpectralNorm, SpectralNorm) and tensors.original.ndim > 1:
            adapt(module, name)
            yield _Parametrized(module, name, tensors)


def _hooks(module: nn.Module) -> Iterator[_Hook]:
    for hook in module._forward_pre_hooks.values():
        if _is_known(hook, TorchHook, _Hook):
            fused = _set_class(_Hook, hook)
            fused.module = module
            if isinstance(weight := getattr(module, fused.name, None), Tensor):
                copyable(weight)
            yield fused


def _is_known(norm: object, *classes: type) -> bool:
    """Return whether an object is of one of these classes, and neither a subclass nor the object overrides a method."""
    return type(norm) in classes and not any(callable(getattr(type(norm), name, None)) for name in vars(norm))


def _is_replica(module: nn.Module) -> bool:
    """Return whether torch.nn.DataParallel made this module. A replica shares the hooks of the original model."""
    return "_is_replica" in module.__dict__


def _set_class(cls: type[T], instance: object) -> T:
    """Change the class of an object in place, so that every holder, including PyTorch's own functions, sees it."""
    instance.__class__ = cls
    return cast(T, instance)
