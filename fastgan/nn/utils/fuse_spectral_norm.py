"""All spectrally normalized weights of a model in one call per forward."""

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
from fastgan.nn.utils.spectral_norm import SpectralNorm, adapt, leaves_to_pytorch
from fastgan.ops.spectral_norm import fits, normalize

M = TypeVar("M", bound=nn.Module)
T = TypeVar("T")


def fuse_spectral_norm(model: M) -> M:
    """Compute every spectrally normalized weight of a model together, once at the start of each of its forwards.

    Finds fastgan's and PyTorch's parametrizations and PyTorch's older forward hooks
    (``torch.nn.utils.spectral_norm``), in ``model`` and everything below it, and changes them in place. The state_dict
    stays as it was, and so do the results: each layer's u and v are renewed when the layer reads its weight, as often
    as it reads it. A layer that a forward skips keeps its u and v. A layer that is called again in the same forward
    computes its own weight from the second call on, and so does a sub-module that is called by itself, a weight that
    something else has changed or replaced (pruning, a second parametrization, FSDP's shards), a forward in a
    transform of torch.func, and a forward that a tracer records.

    One thing differs from PyTorch: where activation checkpointing recomputes a forward, u and v are not renewed again.
    A copy of a model (``copy.deepcopy``, ``pickle``) has the older hooks' weights without their graph.

    Call it again after adding layers; remove a spectral norm as ever. Wrap in DistributedDataParallel, FSDP or
    torch.compile afterwards. Of layers that FSDP shards one by one, each normalizes its own weight when that has been
    gathered.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: no weight of it is spectrally normalized.

    Differentiable twice.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    members: list[_Member] = []
    for module in model.modules():
        members += [*_parametrizations(module), *_hooks(module)]
    if not members:
        raise ValueError(f"{type(model).__name__} has no spectrally normalized weight")
    for module in model.modules():  # a part that was fused before would iterate once more in the forward of the whole
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
        self.norm = _become(SpectralNorm, tensors[0])

    def look(self) -> tuple[Operands, Settings] | None:
        """What there is to normalize, and how; None if a read of the weight would do anything else."""
        # The dictionaries behind the attributes: on a small model nn.Module's look-ups cost as much as the kernel.
        norm, tensors = self.norm, self.tensors
        lists = self.module._modules.get("parametrizations")
        original = tensors._parameters.get("original")  # pruning and FSDP1 put a tensor of theirs in its place
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
        """Remove what was made ready. Whether a training forward has not read it."""
        return discard(self.module, self.name)

    @property
    def is_idle(self) -> bool:
        return self.norm.is_idle

    def set_idle(self) -> None:
        self.norm.is_idle = True


class _Hook(TorchHook):
    """PyTorch's older hook: it sets the weight at its module's forward, that of the model's forward if there is one."""

    module: nn.Module
    plain: Tensor | None = None  # the attribute before a tracer or a transform of torch.func left its own tensor there
    is_idle = False

    def __call__(self, module: nn.Module, inputs: Any) -> None:
        if module is not self.module:  # a replica of torch.nn.DataParallel's
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
        if leaves_to_pytorch(weight, u, v, dim):
            return self.compute_weight(self.module, do_power_iteration=settings.training)
        n = settings.n_power_iterations if settings.training and not is_recomputing() else 0
        (normalized,) = normalize([weight], [u], [v], [dim], n, settings.eps, v_first=True)
        return _like(self.original(), normalized)

    def look(self) -> tuple[Operands, Settings] | None:
        there = any(hook is self for hook in self.module._forward_pre_hooks.values())
        if not there or self.module._parameters.get(self.name + "_orig") is None:
            return None
        return self._operands(), self._settings()

    def original(self) -> Tensor:
        return cast(Tensor, getattr(self.module, self.name + "_orig"))

    def clear(self) -> bool:
        if self.plain is not None:  # a transform's tensor is dead after it, and can be neither copied nor saved
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
    """The hooks of a model whose normalized weights are computed together."""

    def __init__(self, members: list[_Member]) -> None:
        self.members = members

    def before(self, model: nn.Module, inputs: Any) -> None:
        if _is_replica(model):
            return  # each module normalizes its own
        for member in self.members:  # what a forward has left that was broken off, or that this one is inside of
            discard(member.module, member.name, of_all=True)
        if not backends.is_plain():
            return
        # One call serves the members of the same settings, dtype and device.
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
                member.set_idle()  # the next forward that reads it makes it part of the call again


def _fitting(group: list[tuple[_Member, Operands]]) -> list[tuple[_Member, Operands]]:
    """Those that one call can serve; mostly all of them."""
    weights, us, vs, dims = zip(*[operands for _, operands in group], strict=True)
    if not fits(weights, us, vs, dims):
        group = [(member, o) for member, o in group if fits([o.weight], [o.u], [o.v], [o.dim])]
    owners = Counter(id(operands.u) for _, operands in group)
    if len(owners) < len(group):  # of vectors that two weights share, one read renews what the other starts from
        group = [(member, o) for member, o in group if owners[id(o.u)] == 1]
    return group


def _like(original: Tensor, weight: Tensor) -> Tensor:
    """The weight in the shape of its original, which may be a vector that was seen as a matrix."""
    return weight if weight.ndim == original.ndim else weight.view_as(original)


def _vectors(us: tuple[Tensor, ...], vs: tuple[Tensor, ...]) -> list[Vectors]:
    """All u and v, of which a copy keeps the values that they have now."""
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
        # Of several parametrizations only the first sees the original, and only the last makes the weight.
        if len(tensors) == 1 and isinstance(tensors[0], _SpectralNorm) and tensors.original.ndim > 1:
            adapt(module, name)
            yield _Parametrized(module, name, tensors)


def _hooks(module: nn.Module) -> Iterator[_Hook]:
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, TorchHook):
            ours = _become(_Hook, hook)
            ours.module = module
            if isinstance(weight := getattr(module, ours.name, None), Tensor):
                copyable(weight)
            yield ours


def _is_replica(module: nn.Module) -> bool:
    """Whether torch.nn.DataParallel made it: its hooks are those of the model that it copies."""
    return "_is_replica" in module.__dict__


def _become(cls: type[T], instance: object) -> T:
    """Change the class of an object in place: whoever holds it, PyTorch's own functions too, holds ours."""
    instance.__class__ = cls
    return cast(T, instance)
