"""Convert existing models to fastgan's ops where these compute the same."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils import parametrize

from fastgan.convert import minibatch, reroute, spectral_norm, torch_spectral_norm
from fastgan.convert.replace import is_converted
from fastgan.convert.report import Difference, Report, Row, Verification
from fastgan.convert.restore import revert

__all__ = ["Difference", "Report", "Row", "Verification", "convert", "revert"]

_REROUTED = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    *(nn.ReLU, nn.LeakyReLU, nn.SiLU, nn.GELU, nn.Tanh, nn.Sigmoid, nn.Softplus),
    *(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.LayerNorm, nn.GroupNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
)


def convert(model: nn.Module, *, mend: bool = False) -> Report:
    """Replace layers in place by faster fastgan layers that compute the same, and report the outcome for each module.

    | Layer | Recognized forms |
    |---|---|
    | spectral norm | PyTorch's parametrization and older hook; modules with u0 and sv0, or sn_u and sn_sigma |
    | spectral norm, with ``mend=True`` | wrappers with weight_bar, or with w_bar, u and v |
    | minibatch standard deviation | a layer without tensors that appends channels |
    | minibatch discrimination | a layer with a parameter T (in_features, B, C) |
    | a large convolutional model | its forward runs inside ``twice_differentiable()`` on a CPU |
    | a model with attention or another function without a second derivative | the function, if an input requires grad |

    A layer that is not PyTorch's own is replaced only if a copy of it and fastgan's layer agree on random inputs, in
    values and in derivatives up to the second. The report states the difference. If such a layer is called in a
    way that was not compared (other arguments, dimensions or settings), its original code runs.

    Convolutions, activations and norms stay PyTorch modules. ``gradient_penalty`` and ``twice_differentiable`` reroute
    their calls. On a CPU, the forward of a converted model reroutes them too if it has about 2^36 multiplications or
    more, gradients are enabled, no backend is requested by name, and no tracer records the call. A hand-written penalty
    then creates no dense zeros either. Functions that PyTorch cannot differentiate twice, such as attention, are
    rerouted on any device and at any size if an input requires a gradient. A hand-written penalty can then follow.

    A conversion changes a training run by no more than rounding. A layer whose own gradients are wrong is not replaced,
    and the report describes the error. A wrapper with weight_bar is such a layer. It overwrites u and v in each
    forward, so after ``D(real)`` and ``D(fake)`` the backward of the first uses the vectors of the second.
    ``mend=True`` replaces these layers by layers with correct gradients.

    ``forward`` keeps its signature and source. A tracer (torch.jit, torch.export, make_fx, torch.fx) or torch.compile
    sees the original model. Parameters and buffers stay the same tensors under the same keys, so optimizers,
    checkpoints of the unconverted model, hooks, ``copy.deepcopy``, ``pickle`` and DistributedDataParallel keep working.
    A second conversion converts only layers added since. ``revert`` undoes a conversion.

    Order of derivative: that of the fused layers; spectral norm has two.

    ```python
    import torch
    import fastgan

    discriminator = torch.nn.Sequential(
        torch.nn.utils.parametrizations.spectral_norm(torch.nn.Conv2d(3, 8, 3)),
        torch.nn.LeakyReLU(0.2),
        torch.nn.Flatten(),
        torch.nn.Linear(8 * 14 * 14, 1),
    )
    report = fastgan.convert(discriminator)
    print(report)
    print(report.verify(torch.randn(4, 3, 16, 16)))
    ```

    Args:
        model: the module to convert. It is changed in place.
        mend: also replace layers whose gradients are wrong by layers with correct gradients.

    Returns:
        A report with one row per module. Print it, and call its ``verify``.

    Raises:
        TypeError: ``model`` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    report = convert_layers(model, mend)
    rerouted = reroute.convert(model)
    if rerouted is not None:
        report.rows.insert(0, Row("", _name_of(model), None, rerouted))
    return report


def convert_layers(model: nn.Module, mend: bool = False) -> Report:
    """Convert a model's layers, and do not change its own forward."""
    by_torch = torch_spectral_norm.convert(model)
    rows: list[Row] = []
    for path, module in model.named_modules():
        if f".{path}".endswith(".parametrizations") or ".parametrizations." in f".{path}":
            continue
        name = _name_of(module)
        if is_converted(module):
            outcome: tuple[str | None, str] | None = None, "already converted"
        elif isinstance(module, torch.jit.ScriptModule):
            outcome = None, "compiled by TorchScript"
        else:
            found = by_torch.get(module) or spectral_norm.convert(module, mend) or minibatch.convert(module)
            outcome = found or _reason_unchanged(module)
        if outcome is not None:
            rows.append(Row(path, name, *outcome))
    return Report(model, rows)


def _name_of(module: nn.Module) -> str:
    return parametrize.type_before_parametrizations(module).__name__


def _reason_unchanged(module: nn.Module) -> tuple[None, str] | None:
    if isinstance(module, _REROUTED):
        return None, "PyTorch layer; its calls are rerouted inside penalties"
    if type(module).__module__.startswith("torch.nn."):
        return None if _is_container(module) else (None, "PyTorch layer")
    if not _is_container(module) or module._parameters or module._buffers:
        return None, "not a layer that fastgan replaces; penalties reroute the PyTorch functions in it"
    return None


def _is_container(module: nn.Module) -> bool:
    return bool(module._modules)
