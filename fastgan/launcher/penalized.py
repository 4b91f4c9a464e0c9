"""Calls of modules that are penalized: they begin steps, and are rerouted in some of these."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastgan import torch_private
from fastgan.launcher import learning
from fastgan.launcher.roots import Call, add_hooks, leaves, mark_output
from fastgan.launcher.sites import Site, site
from fastgan.launcher.timing import Step, Unit
from fastgan.ops.twice_differentiable import Rerouting, is_rerouting

if TYPE_CHECKING:
    from fastgan.launcher.session import Session


class Root:
    """A module with penalized calls."""

    def __init__(self, module: nn.Module, session: Session) -> None:
        self.units: dict[Site, Unit] = {}
        self._session = session
        self.remove: Callable[[], None] | None = add_hooks(module, self._before, self._after)
        self.reason = None if self.remove is not None else learning.HOOKED  # why its calls are not rerouted

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not torch.compiler.is_compiling():
            self._session.here.calls.append((self, self._open(module, (args, kwargs))))

    def _after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        calls = self._session.here.calls
        if torch.compiler.is_compiling() or not calls or calls[-1][0] is not self:
            return
        opened: _Opened | None = calls.pop()[1]
        if opened is not None:
            opened.close()
            mark_output(output, opened.call)

    def _open(self, module: nn.Module, given: Any) -> _Opened | None:
        if not torch.is_grad_enabled() or not self.units:
            return None
        values = leaves(given)
        inputs = [value for value in values if isinstance(value, Tensor)]
        if not any(x.requires_grad for x in inputs):
            return None
        unit = self.units.get(key := site())
        if unit is None or torch_private.in_transform():
            return None
        # A growing model gets the number of its blocks. Layers that it does not use yet have no gradients.
        if self._session.recorder is not None:
            self._session.recorder.begins(self._session)
        size = inputs[0].shape[1:], *(value for value in values if isinstance(value, int | str))
        step = self._session.here.step_of(unit, size)
        may_reroute = not is_rerouting() and not any(x.is_meta for x in inputs)
        return _Opened(step, Call(unit.module, key, unit.place, True), may_reroute)


class _Opened:
    """A penalized call that runs."""

    def __init__(self, step: Step, call: Call, may_reroute: bool) -> None:
        self.call = call
        self._step = step
        self._before = step.count.total if step.count is not None else 0
        self._inside = ExitStack()
        self._inside.enter_context(step.counting())
        if step.is_fused and may_reroute:
            step.rerouted = True
            self._inside.enter_context(Rerouting())

    def close(self) -> None:
        self._inside.close()
        if self._step.count is not None:
            self._step.forward_work += self._step.count.total - self._before
