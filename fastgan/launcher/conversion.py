"""``--convert``: layers of root modules are converted after the first training call that ``verify`` finds equal."""

from __future__ import annotations

import inspect
from collections import Counter
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fastgan import torch_private
from fastgan.convert import convert_layers, revert
from fastgan.convert.probe import outcome
from fastgan.launcher.learning import is_compiled

_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)
NOTHING = "it has no layer that fastgan replaces"
NO_TENSOR = "its first argument is not a tensor"
COMPILED = "it is compiled by torch.compile"


class Conversion:
    """Args:
    lines: gets a line about each module for the table at the end.
    """

    def __init__(self, lines: list[str]) -> None:
        self._lines = lines
        self._seen: WeakSet[nn.Module] = WeakSet()
        self._converted: WeakSet[nn.Module] = WeakSet()
        self._is_busy = False

    def consider(self, root: nn.Module, args: Any, kwargs: Any) -> None:
        """Convert the module if this was its first training call. The arguments are those of the call."""
        module: nn.Module = root.module if isinstance(root, _WRAPPERS) else root
        if self._is_busy or module in self._seen or not module.training or torch_private.in_transform():
            return
        if type(module).__module__.startswith("torch.nn.utils."):
            return  # a parametrization, whose weight is read
        if not any(parameter.requires_grad for parameter in module.parameters()):
            return
        self._seen.update(module.modules())  # a part that is called separately later has been converted with the whole
        self._is_busy = True  # the copies that verify calls are not to be converted
        try:
            reason = self._convert(module, *_positional(module, args, kwargs))
        finally:
            self._is_busy = False
        name = type(module).__name__
        self._lines.append(
            f"converted: {name}: {reason}" if module in self._converted else f"not converted: {name}: {reason}"
        )

    def _convert(self, module: nn.Module, args: Any, kwargs: Any) -> str:
        if is_compiled(module):
            return COMPILED
        if not args or not any(isinstance(value, Tensor) for value in tree_leaves(args[0])):
            return NO_TENSOR
        report, failure = outcome(lambda: convert_layers(module))
        if failure is None and not report.replaced:
            return NOTHING
        if failure is None:
            with torch.enable_grad():
                verification, failure = outcome(lambda: report.verify(args, kwargs))
        if failure is None and verification.equal and not {"output", "gradient"} & verification.missing.keys():
            self._converted.add(module)
            counts = Counter(row.replaced_by for row in report.replaced)
            return ", ".join(f"{count} x {by}" for by, count in counts.items())
        revert(module)
        if failure is not None:
            return failure
        worst = [
            f"{d.kind} differs by {d.error:.1e} at {d.where}" for d in verification.differences if d.error > d.allowed
        ]
        return "; ".join(worst or [f"no {kind}: {why}" for kind, why in verification.missing.items()])

    def undo(self) -> None:
        for module in self._converted:
            revert(module)


def _positional(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Pass keyword arguments in their places if there are no others: ``verify`` needs a first one."""
    if args:
        return args, kwargs
    bound, _ = outcome(lambda: inspect.signature(module.forward).bind(**kwargs))
    return (args, kwargs) if bound is None else (bound.args, bound.kwargs)
