"""Existing models, made to use fastgan's ops where these compute the same."""

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
    """Replace in place what fastgan computes faster and equally, and report what was replaced and what was not.

    | found                         | in these forms |
    |-------------------------------|------|
    | spectral norm                 | PyTorch's parametrization and older hook; modules with u0, sv0 or sn_u, sn_sigma |
    | spectral norm, if ``mend``    | wrappers with weight_bar |
    | minibatch standard deviation  | a layer of such a name |
    | minibatch discrimination      | a layer with a parameter T (in, B, C) |
    | a large model of convolutions | its forward runs inside ``twice_differentiable()`` on a CPU |

    A layer that is not PyTorch's own is replaced only if a copy of it and fastgan's layer agree on random inputs, in
    values and derivatives up to the second. The report says how far they differ. Called in a way that was not compared
    (other arguments, dimensions or settings), such a layer computes as before. Convolutions, activations and norms stay
    PyTorch's modules: ``gradient_penalty`` and ``twice_differentiable`` reroute their calls. On a CPU the forward of a
    converted model does so too, from about 2^36 multiplications on, while gradients are on, no backend is named and
    nothing records the call. A penalty written by hand then makes no dense zeros either.

    A conversion changes a training run by no more than rounding. A layer whose own gradients are wrong is left alone,
    and the report says what is wrong with it. A wrapper with weight_bar is such a layer: it overwrites u and v in each
    forward, so that after ``D(real)`` and ``D(fake)`` the backward of the first uses the vectors of the second.
    ``mend=True`` replaces these layers by ones with the right gradients.

    ``forward`` keeps its signature and source. Recorded (torch.jit, torch.export, make_fx, torch.fx) or compiled, the
    model is as it was written. Parameters and buffers stay the same tensors under the same keys: optimizers,
    checkpoints of the unconverted model, hooks, ``copy.deepcopy``, ``pickle`` and DistributedDataParallel work.
    Converting again converts what was added. ``revert`` undoes it.

        report = fastgan.convert(discriminator)
        print(report)
        print(report.verify(images))

    Args:
        model: changed in place.
        mend: also replace layers that have wrong gradients, by layers that have the right ones.

    Returns:
        A report with a row for each module; ``print`` it, and call its ``verify``.

    Raises:
        TypeError: ``model`` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    by_torch = torch_spectral_norm.convert(model)
    rows: list[Row] = []
    for path, module in model.named_modules():
        if f".{path}".endswith(".parametrizations") or ".parametrizations." in f".{path}":
            continue
        name = _name_of(module)
        if is_converted(module):
            outcome: tuple[str | None, str] | None = None, "converted already"
        elif isinstance(module, torch.jit.ScriptModule):
            outcome = None, "compiled by TorchScript"
        else:
            found = by_torch.get(module) or spectral_norm.convert(module, mend) or minibatch.convert(module)
            outcome = found or _left_alone(module)
        if outcome is not None:
            rows.append(Row(path, name, *outcome))
    if reroute.convert(model):
        rows.insert(0, Row("", _name_of(model), None, "its forward's calls are rerouted on a CPU, for large batches"))
    return Report(model, rows)


def _name_of(module: nn.Module) -> str:
    return parametrize.type_before_parametrizations(module).__name__


def _left_alone(module: nn.Module) -> tuple[None, str] | None:
    if isinstance(module, _REROUTED):
        return None, "PyTorch's; inside penalties its calls are rerouted"
    if type(module).__module__.startswith("torch.nn."):
        return None if _is_container(module) else (None, "PyTorch's")
    if not _is_container(module) or module._parameters or module._buffers:
        return None, "of no form that fastgan knows"
    return None


def _is_container(module: nn.Module) -> bool:
    return bool(module._modules)
