"""Decide whether a forward allows one pass: D must be piecewise affine and must not mix samples.

The tracer looks up every torch function that receives a tensor derived from the input in a table of rules (rules.py).
If masks and all other constants of the call are held fixed, the result is y = L t + k, where t are the arguments that
depend on the input. The rule declares the constant k and returns the layout of the samples in the result. If there is
no rule, or the call does not fit it, the tracer marks the result with the reason, and with it everything computed from
the result. One pass is possible if no logit is marked. Functions that are not torch functions (a custom
autograd.Function) are found in the graph afterwards.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_leaves

from fastgan import backends, torch_private
from fastgan.ops.gradient_penalty.call import NESTED, Call, Constant, bind, is_plain, tensors
from fastgan.ops.gradient_penalty.freeing import SENDS_ZEROS, is_independent_of_forward, is_piecewise_affine
from fastgan.ops.gradient_penalty.layout import (
    Ineligible,
    Layout,
    MixesSamples,
    is_readable,
    laid_out,
    layout_of_base,
    owners_at,
)
from fastgan.ops.gradient_penalty.paths import follow
from fastgan.ops.gradient_penalty.rules import RULES
from fastgan.ops.gradient_penalty.shards import source
from fastgan.ops.gradient_penalty.stored import is_any_stored
from fastgan.ops.gradient_penalty.table import IN_PLACE, LIKE, LOOKS, SAFE_IN_PLACE
from fastgan.ops.gradient_penalty.writes import INTO_CONSTANTS, WRITES, into_base
from fastgan.ops.library import checkpointed_region
from fastgan.ops.needed import node_of

_UNSEEN = "was modified outside torch functions, or through a view; one pass needs to see every change"
_NO_RULE = (
    "is not known to be piecewise affine and to keep the samples apart, as one pass requires; convolutions, products"
    " with weights, ReLU, clamp, poolings and reshapes are"
)
_ALIASES = {"axis": "dim", "keepdims": "keepdim", "axes": "dims"}
_DATA = Tensor.data.__get__  # type: ignore[attr-defined]


class _Traced(NamedTuple):
    """A tensor that depends on the input."""

    tensor: ref[Tensor]  # a weak reference: tracing does not prolong the life of activations
    version: int
    layout: Layout | None
    why: str | None  # the obstacle to one pass


class Tracer(TorchFunctionMode):
    """Trace all tensors that depend on ``inputs``, each (N, *S), while the discriminator runs."""

    def __init__(self, *inputs: Tensor) -> None:
        super().__init__()
        self.samples = inputs[0].shape[0]  # not len(): compiled graphs hold for any number
        # Tensors outside the trace that require a gradient, each with the view that the calls used instead.
        self.parameters: list[tuple[Tensor, Tensor]] = []
        self.constants: list[Constant] = []
        self.path: set[Node] = set()  # set by find_obstacle: the nodes from the logits to the inputs
        self.single = True  # set by find_obstacle: there is one logit per sample
        self.has_other_outputs = False
        self.attached = False  # the caller may differentiate other outputs, or results that the forward has stored
        self.sends_zeros = False  # set by find_obstacle: a layer's double backward returns zeros for its input
        self._inputs = inputs
        self._traced = {id(x): _Traced(ref(x), x._version, Layout(0), None) for x in inputs}
        self._views: dict[int, Tensor] = {}
        self._counts: dict[int, _Traced] = {}  # results of torch.arange and torch.meshgrid, and where they count
        self._data: list[tuple[Tensor, int]] = []
        self._writes_slices = False
        self._checkpoint: str | None = None  # the place of the first call inside torch.utils.checkpoint

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in LOOKS:
            return func(*args, **kwargs)
        touched = self._touched(args)
        if kwargs:
            touched += self._touched(kwargs.values())
        if touched and func in LIKE and self._known(args[0]) is None:
            touched = []
        if not touched or not torch.is_grad_enabled():  # without gradients, the result is a constant
            result = func(*args, **kwargs)
            if func is torch.arange:
                self._remember_count(args, result)
            elif func is torch.meshgrid and kwargs.get("indexing", "ij") == "ij":
                self._remember_grid(args, result)
            return result
        if self._checkpoint is None and checkpointed_region() is not None:
            self._checkpoint = _place()
        why = None
        for known in touched:
            why = why or known.why
        rule = RULES.get(func) if why is None else None
        call: Call | None = None
        if why is None:
            with torch_private.DisableTorchFunction():
                why = self._unseen(touched)
                if why is None and rule is not None:
                    try:
                        call = self._begin(rule.before, func, args, kwargs, self._whole(touched))
                    except Ineligible as ineligible:
                        why = self._reason(func, str(ineligible))
        if why is not None or rule is None or call is None:
            result = func(*args, **kwargs)
            with torch_private.DisableTorchFunction():
                if why is not None:
                    self._mark(args[0] if func is Tensor.__setitem__ else result, None, why)
                else:
                    self._mark_unknown(func, result, args, kwargs)
            return result
        call.result = result = call.func(*call.args, **call.kwargs)
        with torch_private.DisableTorchFunction():
            layout, why = self._end(call, rule.after)
            self._mark(call.result, layout, why)  # a rule sets the result of __setitem__, which returns None
        return result

    def _touched(self, values: Iterable[Any]) -> list[_Traced]:
        """Return what is known of the tensors among these arguments."""
        touched = []
        for value in values:
            each = (value,) if isinstance(value, Tensor) else tensors(value) if isinstance(value, NESTED) else ()
            for tensor in each:
                known = self._traced.get(id(tensor))
                if known is not None and known.tensor() is tensor:
                    touched.append(known)
        return touched

    def _known(self, tensor: Any) -> _Traced | None:
        made = self._traced.get(id(tensor))
        return made if made is not None and made.tensor() is tensor else None

    def layout(self, tensor: Any) -> Layout | None:
        """Return the layout of the samples in a tensor, or None for a constant."""
        made = self._traced.get(id(tensor))
        known = made.tensor() if made is not None else None
        return made.layout if made is not None and known is tensor and known.requires_grad else None

    def picked(self, index: Tensor, layout: Layout) -> Layout | None:
        """Return the layout of ``x[index]`` if the samples of x lie along its only dimension as ``layout`` says.

        Return None if no layout describes it.
        """
        size = layout.size(self.samples)
        known = self._counts.get(id(index))
        if known is not None and known.layout and known.tensor() is index and known.version == index._version:
            dim = known.layout.dim
            return layout._replace(dim=dim) if index.shape[dim] == size else None
        if not is_readable(index):
            return None
        owners = owners_at(layout, index.cpu() % size, self.samples)
        for dim in range(index.ndim):
            each = owners.movedim(dim, -1)
            first = each[(0,) * (index.ndim - 1)]
            if torch.equal(each, first.expand_as(each)):  # the same samples at all places
                return laid_out(dim, first, self.samples)
        return None

    def _unseen(self, touched: Sequence[_Traced]) -> str | None:
        for known in touched:
            tensor = known.tensor()
            if tensor is not None and tensor.requires_grad and tensor._version != known.version:
                return f"a tensor of shape {tuple(tensor.shape)} {_UNSEEN}{_place()}"
        return None

    def _whole(self, touched: Sequence[_Traced]) -> Layout | None:
        """Return the layout of these tensors if all belong to the same sample."""
        first = touched[0].layout
        if self.samples == 1:
            return first
        return (
            first
            if first
            and first.is_whole()
            and all(known.layout is not None and known.layout.owners == first.owners for known in touched)
            else None
        )

    def _begin(
        self,
        before: Any,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        whole: Layout | None,
    ) -> Call:
        if func in WRITES:
            self._writes_slices = True
        if func in IN_PLACE:
            if self.layout(args[0]) is None and func not in INTO_CONSTANTS:
                raise Ineligible(
                    "writes a tensor that depends on the input into a constant; use the form that is not in place"
                )
            if args[0]._is_view():
                if func not in SAFE_IN_PLACE or self.layout(args[0]) is None:
                    raise Ineligible("is in place on a view; use the form that is not in place")
                self._writes_slices = True
        args, kwargs = bind(self.view, args), bind(self.view, kwargs) if kwargs else kwargs
        call = Call(self, func, args, kwargs, whole)
        if before is not None:
            before(call, *args, **kwargs)
        return call

    def _end(self, call: Call, after: Any) -> tuple[Any, str | None]:
        layout: Any
        named = call.kwargs
        if named:
            named = {_ALIASES.get(name, name): value for name, value in named.items()}
        try:
            layout = after(call, *call.args, **named)
        except MixesSamples as mixed:
            if call.whole is None:
                return None, self._reason(call.func, str(mixed))
            layout = call.whole  # one sample cannot mix with others
        except Ineligible as ineligible:
            return None, self._reason(call.func, str(ineligible))
        except (TypeError, ValueError, IndexError, AttributeError, RuntimeError) as error:
            return None, self._reason(call.func, f"was called in a form without a rule for one pass ({error})")
        of_constants = layout
        if call.args and call.result is call.args[0] and call.result._is_view():
            before = self.layout(call.result)
            if before is not None and before != layout:
                return None, self._reason(call.func, "moves samples in a view; use the form that is not in place")
            if call.constants:
                base = self._known(call.result._base)
                if base is None or base.layout is None or not into_base(call):
                    return None, self._reason(call.func, "adds in place to a view; use the form that is not in place")
                of_constants = base.layout
            self._renew_views(call)
        elif isinstance(call.result, Tensor) and call.result._is_view() and not backends.is_lowered():
            of_constants = self._trace_base(call, layout) or layout
        if call.constants:  # there is one result
            self.constants += [Constant(*constant, of_constants) for constant in call.constants]
        return layout, None

    def _trace_base(self, call: Call, layout: Layout) -> Layout | None:
        """If a function has returned a view of a new tensor, trace that too, and move the constants there.

        A linear layer does so with tokens. A later write into the view leaves the view's node without a gradient, but
        not that of the base. Return the layout of the base, or None if nothing was moved.
        """
        view = call.result
        base = view._base
        if self._known(base) is not None or not base.requires_grad:
            return None
        equal = 0  # trailing dimensions
        while equal < min(view.ndim, base.ndim) and view.shape[-1 - equal] == base.shape[-1 - equal]:
            equal += 1
        of_base = layout if call.whole is not None else layout_of_base(view, layout, self.samples)
        if of_base is None or any(getattr(value, "ndim", 0) + after > equal for _, value, after in call.constants):
            return None
        call.constants = [(torch_private.gradient_edge(base), value, after) for _, value, after in call.constants]
        self._traced[id(base)] = _Traced(ref(base), base._version, of_base, None)
        return of_base

    def _renew_views(self, call: Call) -> None:
        """After a call has written into a view, continue to trace its base and the other views of this base.

        Autograd connects all of them to the write, and their samples lie as before.
        """
        base = call.result._base
        for key, made in self._traced.items():
            tensor = made.tensor()
            if tensor is not None and made.version == call.version and (tensor is base or tensor._base is base):
                self._traced[key] = made._replace(version=tensor._version)

    def view(self, value: Any) -> Any:
        """Replace a tensor that requires a gradient and does not depend on the input by a view of it.

        The pass differentiates with respect to these views. The backward that the user calls continues from there, so
        it accumulates gradients from other uses of a parameter and runs its hooks once.
        """
        if not isinstance(value, Tensor):
            return value
        if not is_plain(value):
            raise Ineligible(f"was given a {type(value).__name__}; one pass reads tensors and parameters")
        made = self._traced.get(id(value))
        if not value.requires_grad or (made is not None and made.tensor() is value):
            return value
        shard = source(value)
        if shard is not None:  # a gathered weight was made from a view already
            if id(shard.view) not in self._views:
                self._views[id(shard.view)] = shard.view
                self.parameters.append(shard)
            return value
        view = self._views.get(id(value))
        if view is None:
            view = self._views[id(value)] = value.view_as(value)
            self.parameters.append((value, view))  # the reference keeps the id unique
        return view

    def nodes_of_views(self) -> dict[Node, Tensor]:
        """Return the parameters by the nodes of the views that the calls used."""
        return {node: parameter for parameter, view in self.parameters if (node := view.grad_fn) is not None}

    def _mark(self, result: Any, layout: Any, why: str | None) -> None:
        if isinstance(result, Tensor):
            if result.requires_grad:
                if why is None and result.is_complex() and backends.is_lowered():
                    why = "complex tensors do not allow one pass in a compiled step"
                self._traced[id(result)] = _Traced(ref(result), result._version, layout, why)
        elif isinstance(result, list | tuple):
            for i, part in enumerate(result):
                self._mark(part, layout[i] if type(layout) is list else layout, why)

    def _mark_unknown(self, func: Any, result: Any, args: Any, kwargs: Any) -> None:
        """Mark the results of a function without a rule. Results that require no gradient are constants."""
        made = [*tensors(result)]
        if func == _DATA:
            self._data.append((result, result._version))
        elif any(tensor.requires_grad for tensor in made):
            self._mark(result, None, self._reason(func, _NO_RULE))
        elif not made and not isinstance(result, bool | int | float | str | list | tuple):
            why = self._reason(func, _NO_RULE)  # a hook, an assignment, or an unknown side effect
            for tensor in tensors((args, kwargs)):
                if tensor is args[0] or self._known(tensor) is not None:
                    self._mark(tensor, None, why)

    def _remember_count(self, args: tuple[Any, ...], result: Any) -> None:
        with torch_private.DisableTorchFunction():
            if all(type(x) is int for x in args) and args in ((result.numel(),), (0, result.numel())):
                self._counts[id(result)] = _Traced(ref(result), result._version, Layout(0), None)

    def _remember_grid(self, args: tuple[Any, ...], result: Any) -> None:
        given = args[0] if len(args) == 1 and isinstance(args[0], list | tuple) else args
        for dim, (count, grid) in enumerate(zip(given, result, strict=True)):
            known = self._counts.get(id(count))
            if known is not None and known.tensor() is count and count is not None and known.version == count._version:
                self._counts[id(grid)] = _Traced(ref(grid), grid._version, Layout(dim), None)

    def _reason(self, func: Any, why: str) -> str:
        return f"{resolve_name(func) or getattr(func, '__name__', func)}{_place()} {why}"

    def note_stored(self, box: list[Any]) -> None:
        """Find out whether the forward has stored results elsewhere than in its output; see ``is_any_stored``."""
        self.attached = is_any_stored((known.tensor for known in self._traced.values()), box, self._inputs)

    def find_obstacle(self, outputs: Sequence[Tensor], returned: Any, *, late: bool = False) -> str | None:
        """Return the obstacle to one pass, or None.

        Args:
            outputs: the logits.
            returned: the output of the discriminator.
            late: whether PyTorch's own functions may have run the first layers.
        """
        outputs = [output for output in outputs if output.requires_grad]
        why = self.obstacle_before(outputs)
        if why is not None:
            return why
        if not self.parameters:
            return "no weight or bias requires a gradient"
        logits = [self._known(output) for output in outputs]
        if any(data._version != version for data, version in self._data):
            return f"a tensor {_UNSEEN}, and .data hides them"
        parts = tree_leaves(returned)
        if not all(any(part is output for part in parts) for output in outputs):
            return "the logits are not among the tensors that the discriminator returned"
        if not all(known and known.layout and known.layout.has_each_equally(self.samples) for known in logits):
            return "some samples have more logits than others"
        self.single = len(outputs) == 1 and outputs[0].numel() == self.samples
        self.has_other_outputs = any(self._is_attached(part, outputs) for part in parts)
        self.attached |= self.has_other_outputs
        return self._check_graph(outputs, late)

    def obstacle_before(self, outputs: Sequence[Tensor]) -> str | None:
        """Return the obstacle that a call has met from which one of these tensors was computed, or None."""
        for output in outputs:
            known = self._known(output)
            if known is None:
                custom = self._custom([output]) or "; torch.jit.script and torch.vmap also hide calls from the trace"
                return f"the logits were not computed from the input by torch functions alone{custom}"
            why = known.why or self._unseen([known])
            if why is not None:
                return why
        return None

    def obstacle_between(self, starts: Sequence[Tensor], ends: Sequence[Tensor]) -> str | None:
        """Return the obstacle to a linear map from ``starts`` to ``ends``, which a function has computed from them."""
        why = self.obstacle_before(ends)
        if why is not None:
            return why
        made = [end.grad_fn for end in ends]
        begin, inputs = {node_of(start) for start in starts}, {node_of(x) for x in self._inputs}
        if len(follow(made, inputs, begin)[0]) > len(inputs):
            return "the logits are not among the tensors that the discriminator returned"
        between, views = follow(made, begin)[0] - begin, self.nodes_of_views()
        if any(before in views for node in between for before, _ in node.next_functions):
            return "select= uses a parameter; do this in the discriminator"
        return None

    def _is_attached(self, part: Any, outputs: Sequence[Tensor]) -> bool:
        if isinstance(part, Tensor):
            return part.requires_grad and not any(part is output for output in outputs)
        return not isinstance(part, bool | int | float | str | type(None))

    def _check_graph(self, outputs: Sequence[Tensor], late: bool) -> str | None:
        targets = {node_of(x) for x in self._inputs}
        self.path, leaves = follow((output.grad_fn for output in outputs), targets, self.nodes_of_views())
        if len(follow((parameter.grad_fn for parameter, _ in self.parameters), targets)[0]) > len(targets):
            return f"a weight depends on the input{self._custom(parameter for parameter, _ in self.parameters)}"
        if leaves:
            shapes = ", ".join(sorted(str(tuple(leaf.variable.shape)) for leaf in leaves))  # type: ignore[attr-defined]
            return f"a tensor that requires a gradient, of shape {shapes}, enters the graph outside torch functions"
        also = {"CopySlices"} if self._writes_slices else set()
        if late:
            also |= SENDS_ZEROS
            self.sends_zeros = any(type(node).__name__ in SENDS_ZEROS for node in self.path)
        refused = [
            node for node in self.path if node not in targets and not is_independent_of_forward(node, self.path, also)
        ]
        curved = {type(node).__name__ for node in refused if 0 not in torch_private.shape_of_result(node)}
        if refused and not curved:
            self.attached = True  # PyTorch's functions ran on no samples; their double backward reads the forward
        if curved and self._checkpoint is not None:
            return (
                f"torch.utils.checkpoint{self._checkpoint} runs PyTorch's functions again in each backward; one pass "
                "needs fastgan's, and the activations"
            )
        return f"{', '.join(sorted(curved))} in its graph, whose gradient depends on the forward" if curved else None

    def _custom(self, tensors: Iterable[Tensor]) -> str:
        """Name the custom autograd.Functions between the input and these tensors."""
        targets = {node_of(x) for x in self._inputs}
        path, _ = follow((tensor.grad_fn for tensor in tensors), targets)
        names = {
            type(node).__name__ for node in path if hasattr(node, "_forward_cls") and not is_piecewise_affine(node)
        }
        return f": {', '.join(sorted(names))} is a custom autograd.Function" if names else ""

    def conditions(self) -> str | None:
        """Return the conditions under which one pass applies, or None if there are none."""
        conditions = []
        if not self.single:
            conditions.append(
                "if the loss has the same gradient for all logits of a sample, as a mean has; otherwise 2 more forwards"
            )
        if self.sends_zeros:
            conditions.append("after the first layers, which are so small that PyTorch's own functions run them")
        if self.has_other_outputs:
            conditions.append("other outputs have a backward of their own: 2 more forwards if a loss uses them")
        return "; ".join(conditions) or None


def _place() -> str:
    """Return the file and line of the current call in the user's code."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(_INSIDE):
        frame = frame.f_back
    return "" if frame is None else f" ({Path(frame.f_code.co_filename).name}:{frame.f_lineno})"


_INSIDE = tuple(str(Path(path).parent) + "/" for path in (torch.__file__, sys.modules["fastgan"].__file__ or ""))
