"""Checkpoints of PyTorch's two forms of spectral normalisation, one into the other."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor

_PARAMETRIZATION = re.compile(r"(?P<path>.*?)parametrizations\.(?P<name>[^.]+)\.(?P<part>original|0\._u|0\._v)")
_HOOK = re.compile(r"(?P<path>(?:.*\.)?)(?P<name>[^.]+)_(?P<part>orig|u|v)")
_PARTS = {"original": "orig", "0._u": "u", "0._v": "v"}


def convert_spectral_norm_state_dict(
    state_dict: Mapping[str, Tensor], form: Literal["parametrization", "hook"]
) -> OrderedDict[str, Tensor]:
    """Rename the keys of spectrally normalised weights in a state_dict to those of the other form.

    ``"hook"`` is ``torch.nn.utils.spectral_norm``: weight_orig, weight_u, weight_v. ``"parametrization"`` is
    ``torch.nn.utils.parametrizations.spectral_norm`` and fastgan's: parametrizations.weight.original, .0._u, .0._v.
    Keys of that form already, and all others, are kept. Tensors are not copied.

    Raises:
        ValueError: ``form`` is neither, or a weight lacks its u or v (checkpoints from before PyTorch 1.0 have no v).
    """
    if form not in ("parametrization", "hook"):
        raise ValueError(f"form must be 'parametrization' or 'hook', got {form!r}")
    renamed = _to_parametrization(state_dict) if form == "parametrization" else _to_hook(state_dict)
    result = OrderedDict((renamed.get(key, key), value) for key, value in state_dict.items())
    metadata = _metadata(state_dict, renamed, form)
    if metadata is not None:
        result._metadata = metadata  # type: ignore[attr-defined]
    return result


def _to_parametrization(state_dict: Mapping[str, Tensor]) -> dict[str, str]:
    renamed = {}
    for key in state_dict:
        match = _HOOK.fullmatch(key)
        if match is None or match["part"] != "orig":
            continue
        stem = key.removesuffix("_orig")
        for part, old in _PARTS.items():
            if f"{stem}_{old}" not in state_dict:
                raise ValueError(f"state_dict has {key} but no {stem}_{old}")
            renamed[f"{stem}_{old}"] = f"{match['path']}parametrizations.{match['name']}.{part}"
    return renamed


def _to_hook(state_dict: Mapping[str, Tensor]) -> dict[str, str]:
    renamed = {}
    for key in state_dict:
        match = _PARAMETRIZATION.fullmatch(key)
        if match is not None and f"{match['path']}parametrizations.{match['name']}.0._u" in state_dict:
            renamed[key] = f"{match['path']}{match['name']}_{_PARTS[match['part']]}"
    return renamed


def _metadata(state_dict: Mapping[str, Tensor], renamed: Mapping[str, str], form: str) -> Any:
    """The hook form keeps its version beside the module's, and reads weights differently where it finds none."""
    metadata = getattr(state_dict, "_metadata", None)
    if metadata is None:
        return None
    metadata = OrderedDict((path, dict(entry)) for path, entry in metadata.items())
    for new in renamed.values():
        if form == "hook" and (match := _HOOK.fullmatch(new)):
            versions = metadata.setdefault(match["path"].rstrip("."), {}).setdefault("spectral_norm", {})
            versions[f"{match['name']}.version"] = 1
        elif match := _PARAMETRIZATION.fullmatch(new):
            metadata.get(match["path"].rstrip("."), {}).pop("spectral_norm", None)
    return metadata
