"""All spectrally normalised weights of a model in one call per forward."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar, cast

from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm as TorchHook

from fastgan import backends, ops
from fastgan.nn.utils.spectral_norm import (
    Ready,
    SpectralNorm,
    adapt,
    is_recomputing,
    is_sharded,
    put,
    ready,
    take,
    thread_and_region,
)
from fastgan.ops.library import checkpointed_region

M = TypeVar("M", bound=nn.Module)
T = TypeVar("T")


def fuse_spectral_norm(model: M) -> M:
    """Compute every spectrally normalised weight of a model together, once at the start of each of its forwards.

    Finds fastgan's and PyTorch's parametrizations and PyTorch's older forward hooks
    (``torch.nn.utils.spectral_norm``), in ``model`` and everything below it, and changes them in place. The state_dict
    and the results stay as they were, but for this: within one forward, a weight that is used several times is
    iterated once; and between forwards the ``weight`` of an older hook is detached, so that the model can be copied. A
    sub-module that is called by itself still normalises its own weights, fused or not before.

    Call it again after adding layers; remove a spectral norm as ever. Wrap in DistributedDataParallel, FSDP or
    torch.compile afterwards. Of layers that FSDP shards one by one, each normalises its own weight when that has been
    gathered.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: no weight of it is spectrally normalised.

    Differentiable twice.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    members: list[_Member] = []
    for module in model.modules():
        members += [*_parametrizations(module), *_hooks(module)]
    if not members:
        raise ValueError(f"{type(model).__name__} has no spectrally normalised weight")
    for module in model.modules():  # a part that was fused before would iterate once more in the forward of the whole
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [k for k, hook in hooks.items() if isinstance(getattr(hook, "__self__", None), _Fused)]:
                del hooks[key]
    fused = _Fused(members)
    model.register_forward_pre_hook(fused.before)
    model.register_forward_hook(fused.after, always_call=True)
    return model


Operands = tuple[Tensor, Tensor, Tensor, int]  # weight, u, v, dim
Settings = tuple[int, float, bool, bool]  # n_power_iterations, eps, training, v_first


class _Parametrized:
    """A weight normalised by a parametrization."""

    def __init__(self, module: nn.Module, name: str, tensors: parametrize.ParametrizationList) -> None:
        self.module, self.name, self.tensors = module, name, tensors
        self.norm = _become(SpectralNorm, tensors[0])

    def look(self) -> tuple[Operands, Settings] | None:
        """What there is to normalise, and how; None if somebody has removed it, or added another."""
        # The dictionaries behind the attributes: on a small model nn.Module's look-ups cost as much as the kernel.
        lists = self.module._modules.get("parametrizations")
        if lists is None or lists._modules.get(self.name) is not self.tensors or len(self.tensors._modules) > 1:
            return None
        norm = self.norm
        buffers = norm._buffers
        operands = self.tensors._parameters["original"], buffers["_u"], buffers["_v"], norm.dim
        return operands, (norm.n_power_iterations, norm.eps, norm.training, False)  # type: ignore[return-value]

    def put(self, weight: Tensor, thread: int, region: object | None) -> None:
        original: Tensor = self.tensors._parameters["original"]  # type: ignore[assignment]
        put(self.module, self.name, ready(weight, original, thread, region))

    def clear(self) -> None:
        take(self.module, self.name)


class _Hook(TorchHook):
    """PyTorch's older hook; `put` by the model's forward, it does nothing at its own module's."""

    module: nn.Module
    ready: Ready | None = None
    plain: Tensor | None = None  # the attribute before a transform of torch.func left its own tensor there

    def __call__(self, module: nn.Module, inputs: Any) -> None:
        if _is_replica(module):
            super().__call__(module, inputs)
        elif backends.in_transform():
            if self.plain is None:
                self.plain = getattr(module, self.name)
            super().__call__(module, inputs)
        elif self.ready is None or not self.ready.is_valid():
            self._normalise(renew=True)
        elif self.ready.thread:
            if self.ready.region is not checkpointed_region():  # which is run again, without what made the weight
                self._normalise(renew=False)
            elif getattr(self.module, self.name) is not self.ready.weight:
                setattr(self.module, self.name, self.ready.weight)  # another thread's is there

    def _normalise(self, renew: bool) -> None:
        weight, u, v, dim = self._operands()
        n_power_iterations, eps, training, v_first = self._settings()
        normalised = ops.spectral_norm(
            [weight],
            [u],
            [v],
            dims=[dim],
            n_power_iterations=n_power_iterations,
            eps=eps,
            update=renew and training and not is_recomputing(),
            v_first=v_first,
        )
        self._set(normalised[0])

    def look(self) -> tuple[Operands, Settings] | None:
        if not any(hook is self for hook in self.module._forward_pre_hooks.values()):
            return None
        return self._operands(), self._settings()

    def put(self, weight: Tensor, thread: int, region: object | None) -> None:
        self._set(weight)
        self.ready = ready(getattr(self.module, self.name), self._original(), thread, region)

    def clear(self) -> None:
        if self.ready is not None:
            if self.ready.is_mine():
                self.detach()
                self.ready = None
        elif self.plain is not None:  # a transform's tensor is dead after it, and can be neither copied nor saved
            setattr(self.module, self.name, self.plain)
        self.plain = None

    def detach(self) -> None:
        """So that the module can be deep-copied; its next forward sets the weight anew."""
        self._set(getattr(self.module, self.name).detach())

    def _operands(self) -> Operands:
        weight, u, v = (getattr(self.module, self.name + suffix) for suffix in ("_orig", "_u", "_v"))
        return weight if weight.ndim > 1 else weight[:, None], u, v, self.dim

    def _settings(self) -> Settings:
        return self.n_power_iterations, self.eps, self.module.training, True

    def _set(self, weight: Tensor) -> None:
        setattr(self.module, self.name, weight.view_as(self._original()))

    def _original(self) -> Tensor:
        original: Tensor = getattr(self.module, self.name + "_orig")
        return original


_Member = _Parametrized | _Hook


class _Fused:
    """The hooks of a model whose normalised weights are computed together."""

    def __init__(self, members: list[_Member]) -> None:
        self.members = members

    def before(self, model: nn.Module, inputs: Any) -> None:
        if _is_replica(model) or backends.in_transform():
            return  # each module normalises its own
        # One call serves the members of the same settings, dtype and device.
        groups: dict[Any, list[tuple[_Member, Operands]]] = {}
        for member in self.members:
            found = member.look()
            if found is None:
                continue
            operands, settings = found
            weight = operands[0]
            if is_sharded(weight):
                continue  # FSDP gathers it at its own module's forward, which then normalises it
            groups.setdefault((settings, weight.dtype, weight.device), []).append((member, operands))
        recomputing = is_recomputing()
        thread, region = thread_and_region()
        for ((n_power_iterations, eps, training, v_first), _, _), group in groups.items():
            weights, us, vs, dims = zip(*[operands for _, operands in group], strict=True)
            normalised = ops.spectral_norm(
                weights,
                us,
                vs,
                dims=dims,
                n_power_iterations=n_power_iterations,
                eps=eps,
                update=training and not recomputing,
                v_first=v_first,
            )
            for (member, _), weight in zip(group, normalised, strict=True):
                member.put(weight, thread, region)

    def after(self, model: nn.Module, inputs: Any, output: Any) -> None:
        if _is_replica(model):
            return
        for member in self.members:
            member.clear()


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
            ours.detach()
            yield ours


def _is_replica(module: nn.Module) -> bool:
    """Whether torch.nn.DataParallel made it: its hooks are those of the model that it copies."""
    return "_is_replica" in module.__dict__


def _become(cls: type[T], instance: object) -> T:
    """Change the class of an object in place: whoever holds it, PyTorch's own functions too, holds ours."""
    instance.__class__ = cls
    return cast(T, instance)
