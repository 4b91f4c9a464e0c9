"""Find the penalized calls of a script, reroute only these, and keep the faster implementation.

A session replaces ``torch.autograd.grad`` and ``torch.autograd.backward``. A call with create_graph=True is traced back
to the root modules whose outputs it differentiates. From then on, calls of these modules from the same place, with an
input that requires a gradient, are rerouted. ``enabled`` and ``fastgan run`` begin a session.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from threading import RLock, local
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from fastgan import backends, torch_private
from fastgan.launcher import learning
from fastgan.launcher.command import Settings
from fastgan.launcher.conversion import Conversion
from fastgan.launcher.penalized import Root
from fastgan.launcher.report import NOTHING, at_end, print_table
from fastgan.launcher.roots import Call, GlobalHooks, mark
from fastgan.launcher.sites import Site, is_called_by_fastgan, place, site
from fastgan.launcher.timing import Step, Unit, Way
from fastgan.ops.gradient_penalty.paths import paths
from fastgan.ops.gradient_penalty.zeros import fill_zeros

PATIENCE = 200  # optimizer steps without a penalty after which the global hooks are removed
TRIES = 4  # attempts to find the modules behind one call with create_graph=True

_grad, _backward = torch.autograd.grad, torch.autograd.backward
_session: Session | None = None


class _Here(local):
    """The running calls and the current step of a thread."""

    def __init__(self) -> None:
        self.calls: list[tuple[Root, Any]] = []
        self.step: Step | None = None

    def step_of(self, unit: Unit, size: object) -> Step:
        step = self.step
        if step is None or step.ended or id(unit) in step.units:
            if step is not None:
                step.end()
            step = self.step = unit.begin(size)
            step.size = size
            step.start()
        step.units.add(id(unit))
        unit.within = step.unit.place
        return step


class Session:
    """The penalized calls that were found, and the hooks that reroute them."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.here = _Here()
        self.units: list[Unit] = []
        self.refused: dict[str, str] = {}  # place -> why nothing is rerouted there
        self.recorder: Any = None  # records a comparison
        self.differentiated = self.penalized = False  # whether there were gradients, and some of a penalty
        self.way = Way.FASTGAN if settings.always else Way.FASTER
        self._roots: WeakKeyDictionary[nn.Module, Root] = WeakKeyDictionary()
        self.notes: list[str] = []  # what was converted and what was not
        self._conversion = Conversion(self.notes) if settings.convert else None
        self._hooks = GlobalHooks(self._conversion.consider if self._conversion is not None else None)
        self._known: dict[Site, list[Call]] = {}
        self._tries: dict[Site, int] = {}
        self._waited = 0
        self._lock = RLock()
        self._handles: list[Any] = []

    def begin(self) -> None:
        self._hooks.turn_on()
        # The hooks ignore compiled modules, so PyTorch's warning about them does not matter.
        warnings.filterwarnings("ignore", r"Using `torch.compile\(module\)` when there are global hooks", UserWarning)
        self._handles = [
            register_optimizer_step_pre_hook(self._before_optimizer),
            register_optimizer_step_post_hook(self._after_optimizer),
        ]
        _exchange({_grad: grad, _backward: backward})

    def end(self) -> None:
        _exchange({grad: _grad, backward: _backward})
        self._hooks.turn_off()
        for handle in self._handles:
            handle.remove()
        for root in self._roots.values():
            if root.remove is not None:
                root.remove()
        self._roots.clear()
        if self._conversion is not None:
            self._conversion.undo()

    def before(self, outputs: Any, inputs: Any, key: Site, where: str, batched: bool) -> None:
        """Called before a call with create_graph=True."""
        if (key in self._known and not self._hooks.are_on) or torch_private.in_transform():
            return
        with self._lock:
            found = learning.find(outputs, inputs, batched=batched)
            calls = [call for call in found.calls if call.takes_gradient or found.reason]
            if not calls and not self._hooks.are_on and self._tries.get(key, 0) < TRIES:
                self._tries[key] = self._tries.get(key, 0) + 1
                self._waited = 0
                self._hooks.turn_on()  # the next such call finds its modules
                return
            if key not in self._known:
                self._waited = max(0, PATIENCE - 2)  # the hooks stay for the other penalties of this step
            self._known[key] = calls
            if not calls:
                self.refused[where] = "no module's output is differentiated"
            for call in calls:
                self._learn(call, found.reason)

    def _learn(self, call: Call, reason: str | None) -> None:
        module = call.module()
        if module is None:
            return
        if isinstance(module, torch.jit.ScriptModule):  # it takes no hooks
            self.refused.setdefault(f"{type(module).__name__} at {call.place}", learning.SCRIPTED)
            return
        if reason is None and learning.is_compiled(module):
            reason = learning.COMPILED
        root = self._roots.get(module)
        if root is None:
            root = self._roots[module] = Root(module, self)
        root.reason = root.reason or reason
        if root.reason is not None:
            self.refused.setdefault(f"{type(module).__name__} at {call.place}", root.reason)
            self.units = [unit for unit in self.units if unit not in root.units.values()]
            root.units.clear()
            return
        if call.site not in root.units:
            unit = Unit(module, call.site, call.place, self.way)
            root.units[call.site] = unit
            self.units.append(unit)

    def after(self, outputs: Any, inputs: Any, result: Any, key: Site) -> Any:
        """Called after a call with create_graph=True. Return its result, with the zeros that PyTorch's would have."""
        step = self.here.step
        self.penalize(outputs)
        points = [x for x in tensors(inputs) if x.requires_grad]
        if step is not None and step.rerouted and not step.ended and isinstance(result, tuple) and points:
            made = [x for x in result if isinstance(x, Tensor) and x.grad_fn is not None]
            if made:
                connected = [x for x in tensors(outputs) if x.grad_fn is not None]
                whole = fill_zeros(made[0], paths(connected, *points), points, made)
                result = tuple(whole if x is made[0] else x for x in result)
        mark(result, learning.GRADIENT, self._known.get(key, []))
        return result

    def penalize(self, outputs: Any) -> None:
        step = self.here.step
        if step is not None and not step.ended:
            step.penalized = True
            step.ends += [x.grad_fn for x in tensors(outputs) if x.grad_fn is not None]

    def _before_optimizer(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        if self._hooks.are_on:
            self._waited += 1
            if self._waited >= PATIENCE:
                self._hooks.turn_off()
        step = self.here.step
        if step is None:
            return
        step.end()
        # A later call of this optimizer has the gradients of another loss, which may be zeros in themselves.
        if id(optimizer) not in step.optimizers:
            step.optimizers.add(id(optimizer))
            pattern = step.pattern()
            if step.rerouted and not pattern.is_empty:
                step.find_used()
                pattern.restore(optimizer, step.used)
            elif not step.is_fused and not pattern.knows(optimizer):
                step.find_used()
                pattern.note(optimizer, step.used)
        step.ends = []

    def _after_optimizer(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        if self.recorder is not None:
            self.recorder.stepped(self, optimizer)


tensors = learning.tensors_in


@wraps(_grad)
def grad(
    outputs: Any,
    inputs: Any,
    grad_outputs: Any = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    *rest: Any,
    **named: Any,
) -> Any:
    given = (outputs, inputs, grad_outputs, retain_graph, create_graph, *rest)
    session = _session
    if session is None or torch.compiler.is_compiling():
        return _grad(*given, **named)
    own = is_called_by_fastgan()
    if create_graph or own:
        session.penalized = True
    if not create_graph:  # perhaps the gradient of a loss, which some scripts compute without backward()
        step = session.here.step
        if session.recorder is not None and not own:
            session.recorder.loss(outputs)
        with _counting(session):
            result = _grad(*given, **named)
        if step is not None:
            step.lap()
        return result
    if own:
        return _grad(*given, **named)
    key = site()
    session.before(outputs, inputs, key, place(), bool(named.get("is_grads_batched", rest[2:3] == (True,))))
    with _counting(session):
        result = _grad(*given, **named)
    return session.after(outputs, inputs, result, key)


@wraps(_backward)
def backward(
    tensors: Any,
    grad_tensors: Any = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    grad_variables: Any = None,
    inputs: Any = None,
) -> None:
    given = (tensors, grad_tensors, retain_graph, create_graph, grad_variables, inputs)
    if torch.compiler.is_compiling() or _session is None:
        return _backward(*given)
    session = _session
    if create_graph:
        session.penalized = True
        session.before(tensors, inputs, site(), place(), False)
    if session.recorder is not None:
        session.recorder.loss(tensors)
    step = session.here.step
    with _counting(session):
        _backward(*given)
    if create_graph:
        session.penalize(tensors)
    if create_graph and inputs is not None:  # otherwise all leaves have gradients already
        points = [x for x in learning.tensors_in(inputs) if x.grad is not None]
        for x, made in zip(points, session.after(tensors, points, tuple(x.grad for x in points), site()), strict=True):
            x.grad = made
    if step is not None:
        step.lap()
    return None


def _counting(session: Session) -> Any:
    session.differentiated = True
    step = session.here.step
    return ExitStack() if step is None else step.counting()


def _exchange(functions: dict[Any, Any]) -> None:
    """Replace functions in all imported modules, also under names imported from another module."""
    by_id = {id(function): new for function, new in functions.items()}
    for module in list(sys.modules.values()):
        names = getattr(module, "__dict__", None)
        if type(names) is dict and not names.get("__name__", "").startswith("fastgan."):
            for name, value in list(names.items()):
                if id(value) in by_id:
                    setattr(module, name, by_id[id(value)])


@contextmanager
def enabled(*, always: bool = False, convert: bool = False) -> Iterator[None]:
    """Context manager: compute the hand-written gradient penalties of the code inside with fastgan, where it is faster.

    The code does not change. The first step with a penalty runs PyTorch's functions and shows which module calls are
    differentiated with ``create_graph=True``. Only these calls are rerouted (see ``twice_differentiable``). A few steps
    are timed with PyTorch and with fastgan, and the faster one is kept. Losses and gradients equal PyTorch's up to
    rounding. A parameter whose gradient is zeros or None in PyTorch has the same here.

    At the end, a table on stderr lists the rerouted calls, and the other penalties with the reasons. ``fastgan run
    train.py`` does the same for a whole script. With ``FASTGAN=off`` in the environment, the context does nothing.
    Contexts may be nested; only the outermost one has an effect.

    ```python
    import torch
    import fastgan

    layers = torch.nn.Conv2d(3, 8, 3), torch.nn.LeakyReLU(0.2), torch.nn.Flatten()
    discriminator = torch.nn.Sequential(*layers)
    optimizer = torch.optim.Adam(discriminator.parameters())
    with fastgan.enabled():
        for _ in range(4):
            images = torch.randn(4, 3, 16, 16, requires_grad=True)
            logits = discriminator(images)
            (grad,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
            optimizer.zero_grad()
            grad.square().sum().backward()
            optimizer.step()
    ```

    Args:
        always: use fastgan without timing it against PyTorch.
        convert: also convert layers of the models that are trained, such as spectral norm, as ``fastgan.convert`` does.
            A model is converted after its first training call, and only if ``verify`` finds no difference on these
            inputs. The end of the context reverts it.
    """
    if _session is not None or backends.is_off():
        yield
        return
    session = begin(Settings(always=always, convert=convert))
    try:
        yield
    finally:
        end()
        print_table(session.units, session.refused, session.notes)


def _report(session: Session, *, is_child: bool) -> Callable[[], None]:
    """Return a function that prints the table of this process, or a line if a script trained without a penalty."""

    def report() -> None:
        nothing = session.differentiated and not session.penalized and not is_child
        print_table(session.units, session.refused, session.notes, NOTHING if nothing else ())

    return report


def _report_of_fork(session: Session) -> Callable[[], None]:
    """Return a function that prints the table of a forked worker. Its parent's table has the inherited entries."""
    units, refused, notes = list(session.units), set(session.refused), len(session.notes)

    def report() -> None:
        own = [unit for unit in session.units if unit not in units]
        others = {name: why for name, why in session.refused.items() if name not in refused}
        print_table(own, others, session.notes[notes:])

    return report


def begin(settings: Settings) -> Session:
    global _session
    _session = Session(settings)
    _session.begin()
    return _session


def end() -> None:
    global _session
    if _session is not None:
        _session.end()
        _session = None


def begin_process(settings: Settings) -> None:
    """Begin a session for this process and its children, until they end."""
    if backends.is_off() or _session is not None:
        return
    from fastgan.launcher import children
    from fastgan.launcher.compare import recorder_of_this_process

    session = begin(settings)
    recorder = recorder_of_this_process()
    if recorder is not None:
        session.recorder, session.way = recorder, recorder.way
        at_end(lambda: recorder.end(session))
    else:
        is_child = children.VARIABLE in os.environ
        children.include(settings)
        at_end(_report(session, is_child=is_child), lambda: _report_of_fork(session))
        patch = getattr(sys.modules["fastgan"], "patch_torch_utils", None)
        if patch is not None:
            patch()
