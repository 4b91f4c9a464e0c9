"""Reroute PyTorch functions, called by unchanged code, to ops with an efficient second derivative."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import ref

import torch
from torch.autograd.graph import Node
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from fastgan import backends, torch_private
from fastgan.ops import conv, lacking, norm, piecewise, pool, regions
from fastgan.ops.attention.multi_head import attention_of_a_model, multi_head_attention_forward
from fastgan.ops.bias_act import functions as activations
from fastgan.ops.grid_sample import grid_sample
from fastgan.ops.library import checkpointed_region, is_autocast, is_plain_class, is_traced
from fastgan.ops.work import CALL, work


def _if_floating(fused: Callable[..., Any], reference: Callable[..., Any]) -> Callable[..., Any]:
    """Call PyTorch's function for input that is not floating-point, so that its own error is raised."""

    def route(input: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return (fused if input.is_floating_point() else reference)(input, *args, **kwargs)

    return route


def _unless_autocast(fused: Callable[..., Any], reference: Callable[..., Any]) -> Callable[..., Any]:
    """Call PyTorch's function under autocast, which prescribes a precision for it."""

    def route(input: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        plain = is_autocast(input.device.type) or not input.is_floating_point()
        return (reference if plain else fused)(input, *args, **kwargs)

    return route


def _unless_out(fused: Callable[..., Any], reference: Callable[..., Any]) -> Callable[..., Any]:
    def route(input: torch.Tensor, *, out: torch.Tensor | None = None) -> Any:
        return fused(input) if out is None else reference(input, out=out)

    return route


def _contiguous(fused: Callable[..., Any]) -> Callable[..., Any]:
    """Make the result contiguous, as PyTorch's layer and instance norm do: `view` often follows."""
    return lambda *args, **kwargs: fused(*args, **kwargs).contiguous()


def _batch_norm(
    input: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> torch.Tensor:
    """Take the arguments in the order of ``torch.batch_norm``."""
    result: torch.Tensor = _ROUTES[F.batch_norm](
        input, running_mean, running_var, weight, bias, training, momentum, eps
    )
    return result


# Functions that PyTorch differentiates at most once.
_LACKING: dict[Callable[..., Any], Callable[..., Any]] = {
    F.scaled_dot_product_attention: attention_of_a_model,
    F.multi_head_attention_forward: multi_head_attention_forward,
    F.hardsigmoid: piecewise.ROUTES[F.hardsigmoid],
    **lacking.ROUTES,
    # The same function. A reroute notices it: a pass through a graph does not fill the gradients of activations.
    torch.Tensor.retain_grad: torch.Tensor.retain_grad,
}
NAMES_OF_LACKING = frozenset(function.__name__ for function in _LACKING)
_ROUTES: dict[Callable[..., Any], Callable[..., Any]] = {
    **_LACKING,
    **piecewise.ROUTES,
    **{
        function: getattr(conv, f"conv{kind}{n}d")
        for kind in ("", "_transpose")
        for n in (1, 2, 3)
        for function in {getattr(F, f"conv{kind}{n}d"), getattr(torch, f"conv{kind}{n}d")}
    },
    **{
        function: getattr(pool, f"avg_pool{n}d")
        for n, functions in ((1, {F.avg_pool1d, torch.avg_pool1d}), (2, {F.avg_pool2d}), (3, {F.avg_pool3d}))
        for function in functions
    },
    F.layer_norm: _if_floating(_contiguous(norm.layer_norm), F.layer_norm),
    F.group_norm: _if_floating(norm.group_norm, F.group_norm),
    F.instance_norm: _if_floating(_contiguous(norm.instance_norm), F.instance_norm),
    F.batch_norm: _if_floating(norm.batch_norm, F.batch_norm),
    torch.batch_norm: _batch_norm,
    F.grid_sample: grid_sample,
    F.leaky_relu: activations.leaky_relu,
    F.leaky_relu_: partial(activations.leaky_relu, inplace=True),
    **dict.fromkeys((F.relu, torch.relu, torch.Tensor.relu), activations.relu),
    **dict.fromkeys((F.relu_, torch.relu_, torch.Tensor.relu_), partial(activations.relu, inplace=True)),
    F.silu: activations.silu,
    F.gelu: activations.gelu,
    F.softplus: _unless_autocast(activations.softplus, F.softplus),
    **dict.fromkeys((torch.tanh, torch.Tensor.tanh), _unless_out(activations.tanh, torch.tanh)),
    **dict.fromkeys((torch.tanh_, torch.Tensor.tanh_), partial(activations.tanh, inplace=True)),
    **dict.fromkeys((torch.sigmoid, torch.Tensor.sigmoid), _unless_out(activations.sigmoid, torch.sigmoid)),
    **dict.fromkeys((torch.sigmoid_, torch.Tensor.sigmoid_), partial(activations.sigmoid, inplace=True)),
}


_IN_PLACE = {function for function in _ROUTES if function.__name__.rstrip("_") + "_" == function.__name__}
_WITH_INPLACE_FLAG = {function for function in _ROUTES if "inplace" in getattr(function, "__annotations__", ())}
_PLAIN = {
    torch.Tensor,
    torch.nn.Parameter,
    torch_private.FunctionalTensor,
}  # the last one while torch.compile records a graph


class Reroute(TorchFunctionMode):
    """Args:
    routes: the functions that are rerouted.
    after: the number of multiplications that PyTorch's own functions compute first, minus the cost of calling
        fastgan's. Functions that PyTorch cannot differentiate twice are rerouted from the start.
    call: the cost of calling one of fastgan's functions.
    """

    def __init__(
        self, routes: dict[Callable[..., Any], Callable[..., Any]] = _ROUTES, after: int = 0, call: int = CALL
    ) -> None:
        super().__init__()
        self._routes = routes
        self.is_whole = routes is _ROUTES
        self.taken = False  # whether any call was rerouted
        self.left, self._call = after, call
        self.leaves: dict[Node, torch.Tensor] = {}
        self.results: list[ref[torch.Tensor]] = []  # of all calls

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if backends.is_lowered():
            self._keep_leaves((args, kwargs))
        result = self._run(func, types, args, kwargs or {})
        if self.is_whole:
            if isinstance(result, torch.Tensor):
                self.results.append(ref(result))
            elif isinstance(result, list | tuple):
                self.results += [ref(part) for part in result if isinstance(part, torch.Tensor)]
        return result

    def _run(self, func: Callable[..., Any], types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        route = self._routes.get(func) if self.left <= 0 else self._counted_route(func, args, kwargs)
        if route is None or not torch.is_grad_enabled() or checkpointed_region() is not None or is_traced():
            return func(*args, **kwargs)
        self.taken = True
        if _PLAIN.issuperset(types):
            return route(*args, **kwargs)
        own = [cls for cls in types if cls not in _PLAIN]
        if len(own) > 1 or not is_plain_class(own[0]) or _is_in_place(func, args, kwargs):
            return func(*args, **kwargs)
        # The class may override methods that PyTorch's functions never call, so pass plain tensors. Its
        # __torch_function__ then gives the result the same type as PyTorch does.
        args, kwargs = tuple(map(_as_plain, args)), {name: _as_plain(value) for name, value in kwargs.items()}
        return own[0].__torch_function__(route, types, args, kwargs)

    def _counted_route(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Callable[..., Any] | None:
        cost = work(func, args, kwargs)
        self.left -= cost - self._call if cost else 0
        return (self._routes if self.left <= 0 else _LACKING).get(func)

    def _keep_leaves(self, given: Any) -> None:
        """Remember the inputs of a graph that is being recorded, because their nodes do not refer to them."""
        for tensor in tree_leaves(given):
            if isinstance(tensor, torch.Tensor):
                with torch_private.DisableTorchFunction():
                    node = tensor.grad_fn
                if node is not None and type(node).__name__ == "Error":
                    self.leaves[node] = tensor


def _as_plain(value: Any) -> Any:
    return torch.Tensor.as_subclass(value, torch.Tensor) if isinstance(value, torch.Tensor) else value


def _is_in_place(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    if func in _WITH_INPLACE_FLAG:
        return kwargs.get("inplace", False) or any(value is True for value in args[1:])
    return func in _IN_PLACE


def leaves_of(modes: Iterable[TorchFunctionMode]) -> dict[Node, torch.Tensor]:
    """Return the inputs of the recorded graph that require a gradient and that were rerouted, by their nodes."""
    return {node: leaf for mode in modes if isinstance(mode, Reroute) for node, leaf in mode.leaves.items()}


def is_rerouting() -> bool:
    return any(isinstance(mode, Reroute) and mode.is_whole for mode in torch_private.function_modes())


@regions.in_graph
def _begin(grad_mode: bool) -> torch.Tensor:
    if not regions.is_rehearsal():
        regions.begin([Reroute()], grad_mode)
    return torch.empty(0)  # a node of Dynamo's graph has a result


@regions.in_graph
def _end() -> torch.Tensor:
    if not regions.is_rehearsal():
        regions.end()
    return torch.empty(0)


# Functions compiled by torch.compile run uncompiled while a thread is inside: a compiled graph cannot be differentiated
# twice.
uncompiled = torch_private.Uncompiled()


class Rerouting:
    """``twice_differentiable`` from the call on that passes ``after`` multiplications, less ``call`` for each call.

    Before it, and throughout if ``after`` is None, only functions that PyTorch cannot differentiate twice are rerouted.
    """

    def __init__(self, after: int | None = 0, call: int = CALL) -> None:
        self._mode = Reroute(_LACKING) if after is None else Reroute(after=after, call=call)
        self.results = self._mode.results  # of all calls inside
        self._inside = False

    @property
    def never_started(self) -> bool:
        return self._mode.left > 0 or not self._mode.is_whole

    @property
    def only_pytorch_ran(self) -> bool:
        """Whether nothing was rerouted."""
        return not self._mode.taken

    def __enter__(self) -> Rerouting:
        self._inside = not is_traced()  # the compiler's stance cannot change inside of a function that it traces
        if self._inside:
            uncompiled.__enter__()
            self._mode.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        if self._inside:
            try:
                self._mode.__exit__(*error)  # type: ignore[no-untyped-call]
            finally:
                uncompiled.__exit__(*error)


@contextmanager
def compiled_region() -> Iterator[None]:
    """``twice_differentiable`` in a function that torch.compile traces, where ``regions.is_entered()`` allows it."""
    _begin(torch.is_grad_enabled())
    backends.enter_penalty()
    try:
        yield
    finally:
        backends.leave_penalty()
        _end()


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Context manager: PyTorch functions use fastgan's ops wherever these make the second derivative cheaper.

    Wrap the forward of a hand-written penalty in it. Values and derivatives stay equal to PyTorch's up to rounding.

    These functions are rerouted, whether code calls them as functions, as methods or through modules, also in place:

    - conv1d/2d/3d and conv_transpose1d/2d/3d
    - layer_norm, group_norm, instance_norm and batch_norm
    - relu, leaky_relu, silu, gelu, tanh, sigmoid and (outside autocast) softplus
    - hardtanh, relu6, clamp, threshold, softshrink, hardshrink, abs, prelu, rrelu, and maximum and minimum with a
      constant
    - avg_pool, max_pool, adaptive_avg_pool and adaptive_max_pool in 1, 2 and 3 dimensions, and fractional_max_pool2d/3d
    - pad with mode "reflect", "replicate" or "circular"
    - interpolate with mode "area"
    - functions whose second derivative PyTorch lacks: scaled_dot_product_attention and nn.MultiheadAttention, cdist,
      pdist, pairwise_distance (at distance zero), hardsigmoid, embedding_bag with per-sample weights, segment_reduce,
      and LSTM, GRU and RNN on CUDA, which run without cuDNN

    PyTorch's own implementation runs in all other cases: for tensor subclasses with their own ``__torch_function__`` or
    ``__torch_dispatch__`` (and for in-place calls on any subclass), while gradients are disabled, inside
    torch.utils.checkpoint, and while a tracer records the call (torch.jit.trace, torch.export, make_fx, torch.fx).

    Functions compiled by torch.compile run uncompiled inside this context. Inside a function that torch.compile traces,
    the context works with ``fullgraph=True`` and otherwise does nothing; see ``fastgan.compilable``. It applies to the
    current thread and may be nested.

    ```python
    import torch
    import fastgan

    layers = torch.nn.Conv2d(3, 8, 3), torch.nn.LeakyReLU(0.2), torch.nn.Flatten()
    discriminator = torch.nn.Sequential(*layers)
    images = torch.randn(4, 3, 16, 16, requires_grad=True)
    with fastgan.twice_differentiable():
        logits = discriminator(images)
    (grad,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
    grad.square().sum().backward()
    ```
    """
    if regions.is_entered(whole=True):
        with compiled_region():
            yield
        return
    if is_traced():
        yield
    elif is_rerouting():
        with uncompiled:
            yield
    else:
        with Rerouting():
            yield
