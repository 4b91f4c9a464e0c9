"""Convert PyTorch's own two forms of spectral normalization: the parametrization and the older hook."""

from __future__ import annotations

from typing import Any, cast

from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm as TorchHook

from fastgan.nn.utils.fuse_spectral_norm import (
    _Fused,
    _Hook,
    _hooks,
    _parametrizations,
    _Parametrized,
    fuse_spectral_norm,
)
from fastgan.nn.utils.spectral_norm import SpectralNorm

# Marks in the __dict__ of changed objects. revert changes only marked objects, and copies keep the marks.
_CONVERTED, _FUSED = "_fastgan_converted", "_fastgan_fused"

_UNCHANGED = "normalizes a vector, is one of several parametrizations, or has methods of its own; not replaced"

Outcome = tuple[str | None, str]  # the replacement or None, and the reason or a note


def convert(model: nn.Module) -> dict[nn.Module, Outcome]:
    """Convert all weights that PyTorch normalizes. Return the outcome for each module that has one."""
    fused_before = any(_is_fused(hook) for module in model.modules() for hook in module._forward_pre_hooks.values())
    converted_before = {id(norm) for module in model.modules() for norm in _norms(module) if _is_from_fastgan(norm)}
    outcomes: dict[nn.Module, Outcome] = {}
    members = 0
    for module in model.modules():
        found = [m.norm if isinstance(m, _Parametrized) else m for m in (*_parametrizations(module), *_hooks(module))]
        members += len(found)
        for norm in _norms(module):
            if id(norm) in converted_before:
                outcomes[module] = None, "already fastgan's spectral norm"
            elif any(norm is converted for converted in found):
                norm.__dict__[_CONVERTED] = True
                outcomes[module] = "fused spectral norm", "one call per weight"
            else:
                outcomes[module] = None, _UNCHANGED
    if members and not fused_before:
        fuse_spectral_norm(model)
        model.__dict__[_FUSED] = True
        note = f"one call per forward for {members} weight{'s' if members > 1 else ''}"
        outcomes = {module: (by, note if by else why) for module, (by, why) in outcomes.items()}
    return outcomes


def restore(model: nn.Module) -> None:
    for module in model.modules():
        if module.__dict__.pop(_FUSED, False):
            hooks: dict[int, Any]
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                for key in [k for k, hook in hooks.items() if _is_fused(hook)]:
                    del hooks[key]
                    module._forward_hooks_always_called.pop(key, None)
        for norm in _norms(module):
            if norm.__dict__.pop(_CONVERTED, False):
                norm.__class__ = _SpectralNorm if isinstance(norm, SpectralNorm) else TorchHook
                norm.__dict__.pop("module", None)
                norm.__dict__.pop("ready", None)


def _norms(module: nn.Module) -> list[Any]:
    """Return the parametrizations and hooks that normalize a weight of this module, PyTorch's and fastgan's."""
    found: list[Any] = [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, TorchHook)]
    if parametrize.is_parametrized(module):
        for tensors in cast(nn.ModuleDict, module.parametrizations).values():
            found += [norm for norm in cast(nn.ModuleList, tensors) if isinstance(norm, _SpectralNorm)]
    return found


def _is_from_fastgan(norm: object) -> bool:
    return isinstance(norm, SpectralNorm | _Hook)


def _is_fused(hook: object) -> bool:
    return isinstance(getattr(hook, "__self__", None), _Fused)
