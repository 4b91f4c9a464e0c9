"""Convert checkpoints between PyTorch's two forms of spectral normalization."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor

# Pruning a parameter under a spectral norm replaces its name by the same name with _orig and with _mask.
_PARAMETRIZATION = re.compile(
    r"(?P<path>.*?)parametrizations\.(?P<name>[^.]+)\.(?P<part>original(_orig|_mask)?|0\._u|0\._v)"
)
_HOOK = re.compile(r"(?P<path>(?:.*\.)?)(?P<name>[^.]+?)_(?P<part>orig(_orig|_mask)?|u|v)")
_PARTS = {
    "original": "orig",
    "original_orig": "orig_orig",
    "original_mask": "orig_mask",
    "0._u": "u",
    "0._v": "v",
}
_VECTORS = {"parametrization": ("0._u", "0._v"), "hook": ("u", "v")}


def convert_spectral_norm_state_dict(
    state_dict: Mapping[str, Tensor], form: Literal["parametrization", "hook"]
) -> OrderedDict[str, Tensor]:
    """Rename the keys of spectrally normalized weights in a state_dict to those of another form.

    - ``"hook"``: the keys of ``torch.nn.utils.spectral_norm``: weight_orig, weight_u, weight_v.
    - ``"parametrization"``: the keys of ``torch.nn.utils.parametrizations.spectral_norm`` and of fastgan:
      parametrizations.weight.original, parametrizations.weight.0._u, parametrizations.weight.0._v.

    All other keys stay as they are. That includes keys that already have the requested form, and keys of pruned layers
    without a spectral norm. A pruned original keeps its mask. Prefixes such as ``module.`` are kept. Tensors are not
    copied.

    ```python
    import torch
    import fastgan

    layer = torch.nn.utils.spectral_norm(torch.nn.Linear(4, 3))
    state = fastgan.nn.utils.convert_spectral_norm_state_dict(
        layer.state_dict(), "parametrization"
    )
    fastgan.nn.utils.spectral_norm(torch.nn.Linear(4, 3)).load_state_dict(state)
    ```

    Args:
        state_dict: a state_dict. It is not changed.
        form: the form of the result.

    Returns:
        A new dictionary with the same tensors in the same order.

    Raises:
        ValueError: ``form`` is unknown, or a weight lacks its u or v. Checkpoints from before PyTorch 1.0 have no v,
            and a dictionary of parameters alone has neither.
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
    renamed: dict[str, str] = {}
    for key in state_dict:
        for new, old in _PARTS.items():
            stem = key.removesuffix(f"_{old}")
            if stem != key and old.startswith("orig") and _has_vectors(state_dict, key, stem + "_", "hook"):
                path, _, name = stem.rpartition(".")
                start = f"{path}." if path else ""
                parts = {new: old, "0._u": "u", "0._v": "v"}
                renamed |= {f"{stem}_{o}": f"{start}parametrizations.{name}.{n}" for n, o in parts.items()}
    return renamed


def _to_hook(state_dict: Mapping[str, Tensor]) -> dict[str, str]:
    renamed: dict[str, str] = {}
    for key in state_dict:
        match = _PARAMETRIZATION.fullmatch(key)
        if match is not None and match["part"].startswith("original"):
            stem = key.removesuffix(match["part"])
            if _has_vectors(state_dict, key, stem, "parametrization"):
                parts = {match["part"]: _PARTS[match["part"]], "0._u": "u", "0._v": "v"}
                renamed |= {stem + new: f"{match['path']}{match['name']}_{old}" for new, old in parts.items()}
    return renamed


def _has_vectors(state_dict: Mapping[str, Tensor], key: str, stem: str, form: str) -> bool:
    """Return whether the state_dict has u and v for this original. Raise if it has only one of them."""
    missing = [stem + part for part in _VECTORS[form] if stem + part not in state_dict]
    is_pruned_alone = form == "hook" and stem + "mask" in state_dict  # weight_orig and weight_mask, no spectral norm
    may_be_other = form == "parametrization" or key != f"{stem}orig" or is_pruned_alone
    if len(missing) == 1 or (missing and not may_be_other and not _is_part_of_pruned(state_dict, stem)):
        raise ValueError(f"state_dict has {key} but no {' and no '.join(missing)}")
    return not missing


def _is_part_of_pruned(state_dict: Mapping[str, Tensor], stem: str) -> bool:
    """Return whether the stem is the weight_orig_ of weight_orig_orig, whose u and v are weight_u and weight_v."""
    shorter = stem.removesuffix("orig_")
    return shorter != stem and all(shorter + part in state_dict for part in _VECTORS["hook"])


def _metadata(state_dict: Mapping[str, Tensor], renamed: Mapping[str, str], form: str) -> Any:
    """Return the metadata of the renamed state_dict.

    The hook form stores a version in the metadata of its module. Without one, it loads weights in another way.
    """
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
