"""Convert spectral normalization from other codebases: a method that returns the weight, or a wrapper module.

    method     The module has a weight, a buffer (1, out) for u and a buffer (1) for sigma: u0 and sv0 with W_() in the
               style of BigGAN, or sn_u and sn_sigma. It updates v first, then u. In evaluation it also iterates, but
               does not store the result. BigGAN iterates once there, whatever the number of iterations is.
    wrapper    It wraps a module whose weight_bar, weight_u and weight_v are parameters, or has w_bar, u and v itself,
               as torchgan's, and iterates at each forward. It overwrites u and v, so a backward after two forwards
               reads the wrong ones.

Names only find candidates. A module is replaced if its weight, its state and the derivatives up to the second equal
fastgan's on random values, in training and in evaluation. Tiny and large weights show an eps or a bound of sigma. If
only the gradients after two forwards differ, a replacement changes the training run, so it is made only on request
(``mend``).
"""

from __future__ import annotations

import copy
import inspect
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastgan import ops
from fastgan.convert.probe import TOLERANCE, derivatives, difference, double, outcome, randomize
from fastgan.convert.replace import Replacement, become, can_become, changed_attributes

Outcome = tuple[str | None, str]

_BUFFERS = (("u0", "sv0"), ("sn_u", "sn_sigma"))
_METHODS = re.compile(r"W_|W_bar|sn_weights?|\w*normali[sz]ed?_?weights?|weights?_?(sn|normali[sz]ed)", re.IGNORECASE)
_ITERATIONS = ("num_itrs", "num_iters", "n_power_iterations", "power_iterations", "n_iter", "Ip")
_EPS = ("eps", "epsilon")
_COMMON_EPS = (1e-12, 1e-6, 1e-8)
_SCALES = (1e-6, 1e3, 1.0)  # of the weights that are tried
_MENDED = "corrects its gradients, which were wrong after two forwards before one backward"
_WRONG = (
    "not replaced, but its gradients are wrong after two forwards before one backward, such as D(real) and D(fake): "
    "the second forward overwrites the u and v that the backward of the first reads; "
    "convert(model, mend=True) replaces it"
)


class _Method(Replacement):
    """The weight method of a module that stores u and sigma, but not v."""

    def replacement(self: Any) -> Tensor:
        settings, weight = self._fastgan, self.weight
        u = getattr(self, settings["u"])
        if not self.training:
            u = u.clone()
        u = u.view(-1)
        v = u.new_empty(weight.numel() // len(u))  # written before it is read
        (normalized,) = ops.spectral_norm(
            [weight],
            [u],
            [v],
            dims=[0],
            n_power_iterations=settings["n_power_iterations"] if self.training else settings["in_evaluation"],
            eps=settings["eps"],
            v_first=True,
        )
        if self.training:
            with torch.no_grad():
                # W v = sigma u / |u|^2, and |u| < 1 if eps bounds a norm. One row gives sigma; take the row with the
                # largest element of u.
                row = u.abs().argmax().view(1)
                product = weight.flatten(1).index_select(0, row) @ v
                getattr(self, settings["sigma"]).copy_(product / u.index_select(0, row) * u.dot(u))
        return normalized


class _Wrapper(Replacement):
    """A wrapper that sets the weight of its inner module at each forward."""

    def replacement(self: Any) -> None:
        settings, name = self._fastgan, self.name
        weight, u, v = (getattr(self.module, name + suffix) for suffix in ("_bar", "_u", "_v"))
        (normalized,) = ops.spectral_norm(
            [weight],
            [u],
            [v],
            dims=[0],
            n_power_iterations=settings["n_power_iterations"],
            eps=settings["eps"],
            v_first=True,
        )
        setattr(self.module, name, normalized)

    def around(self: Any, forward: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return forward(self, *args, **kwargs)
        finally:
            _detach_weight(self)


class _WholeForward(Replacement):
    """A wrapper that has w_bar, u and v itself, and sets the weight of its inner module in its forward."""

    def replacement(self: Any, *args: Any) -> Any:
        settings = self._fastgan
        (normalized,) = ops.spectral_norm(
            [self.w_bar],
            [self.u],
            [self.v],
            dims=[0],
            n_power_iterations=settings["n_power_iterations"],
            eps=settings["eps"],
            v_first=True,
        )
        setattr(self.module, self.name, normalized)
        try:
            return self.module(*args) if settings["hooks"] else self.module.forward(*args)
        finally:
            _detach_weight(self)


def _detach_weight(wrapper: Any) -> None:
    """A weight with a graph cannot be copied or pickled. After a failed forward there may be no weight."""
    weight = getattr(wrapper.module, wrapper.name, None)
    if isinstance(weight, Tensor):
        setattr(wrapper.module, wrapper.name, weight.detach())


def convert(module: nn.Module, mend: bool) -> Outcome | None:
    """Replace a module of either form. Return None if it has neither form.

    Args:
        module: any module.
        mend: also replace the module if its own gradients after two forwards are wrong.
    """
    buffers = next((pair for pair in _BUFFERS if all(name in module._buffers for name in pair)), None)
    if buffers is not None and isinstance(getattr(module, "weight", None), nn.Parameter):
        return _convert_method(module, *buffers, mend)
    if _is_wrapper(module):
        return _convert_wrapper(module, mend)
    if all(isinstance(module._parameters.get(name), nn.Parameter) for name in ("w_bar", "u", "v")):
        return _convert_whole_forward(module, mend)
    return None


def _convert_method(module: Any, u: str, sigma: str, mend: bool) -> Outcome:
    if "u1" in module._buffers and u == "u0":
        return None, "estimates several singular values"
    weight, vector = module.weight, getattr(module, u)
    if weight.ndim < 2 or vector.shape != (1, weight.shape[0]):
        return None, f"{u} has shape {tuple(vector.shape)}, not (1, {weight.shape[0]})"
    attribute = _weight_method(type(module))
    if attribute is None:
        return None, f"has {u} and {sigma}, but no known method that returns the weight"

    def normalized(copied: Any) -> Tensor:
        found = getattr(copied, attribute)
        return cast(Tensor, found() if callable(found) else found)

    form = _Form(normalized, lambda copied: copied.weight)
    return _replace_if_equal(module, _Method, attribute, form, mend, u=u, sigma=sigma)


def _weight_method(cls: type) -> str | None:
    """Return the name of the property, or of the method without arguments, that returns the normalized weight."""
    for name in dir(cls):
        if _METHODS.fullmatch(name) and name not in dir(nn.Module):
            found = inspect.getattr_static(cls, name)
            if isinstance(found, property) or (
                inspect.isfunction(found) and len(inspect.signature(found).parameters) == 1
            ):
                return name
    return None


def _is_wrapper(module: Any) -> bool:
    name, child = getattr(module, "name", None), module._modules.get("module")
    return (
        isinstance(name, str)
        and child is not None
        and all(isinstance(child._parameters.get(name + suffix), nn.Parameter) for suffix in ("_bar", "_u", "_v"))
    )


def _convert_wrapper(module: Any, mend: bool) -> Outcome:
    attribute = "_update_u_v"
    if not inspect.isfunction(getattr(type(module), attribute, None)):
        return None, f"wraps a module with {module.name}_bar, but has no {attribute}()"
    weight = getattr(module.module, module.name + "_bar")
    if weight.ndim < 2:
        return None, "normalizes a vector"
    current = getattr(module.module, module.name, None)
    if isinstance(current, Tensor):  # left by a forward; each forward sets it again before use
        setattr(module.module, module.name, current.detach())

    def normalized(copied: Any) -> Tensor:
        getattr(copied, attribute)()
        return cast(Tensor, getattr(copied.module, copied.name))

    form = _Form(normalized, lambda copied: getattr(copied.module, copied.name + "_bar"))
    # A weight with one row or column has one pair of singular vectors, so the comparison cannot show the overwriting.
    return _replace_if_equal(module, _Wrapper, attribute, form, mend, hidden=1 in weight.flatten(1).shape)


class _Shown(nn.Module):
    """Stands for the inner module of a wrapper, and returns the weight that it was given."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.arguments = name, list[tuple[Any, ...]]()

    def forward(self, *args: Any) -> Tensor:
        self.arguments.append(args)
        return cast(Tensor, getattr(self, self.name))


def _convert_whole_forward(module: Any, mend: bool) -> Outcome | None:
    name = getattr(module, "name", None)
    if not isinstance(name, str) or not isinstance(module._modules.get("module"), nn.Module) or module.w_bar.ndim < 2:
        return None
    current = getattr(module.module, name, None)
    if isinstance(current, Tensor) and not isinstance(current, nn.Parameter):  # left by a forward
        setattr(module.module, name, current.detach())
    ran: list[object] = []  # the calls of the inner module's hooks

    def prepare(copied: Any) -> None:
        copied.module = _Shown(name)
        copied.module.register_forward_pre_hook(lambda *_: ran.append(None))

    def normalized(copied: Any) -> Tensor:
        weight = copied.forward(1, 2)
        if copied.module.arguments[-1] != (1, 2):
            raise ValueError("its forward does not pass its arguments on")
        return cast(Tensor, weight)

    form = _Form(normalized, lambda copied: copied.w_bar, prepare)
    _, failure = outcome(lambda: form.results(double(module)))
    settings = {"hooks": failure is not None or bool(ran), "hidden": 1 in module.w_bar.flatten(1).shape}
    return _replace_if_equal(module, _WholeForward, "forward", form, mend, **settings)


@dataclass
class _Form:
    """How to try a module of one form.

    Args:
        normalized: returns the normalized weight of a copy.
        weight: returns the weight that it normalizes.
        prepare: is called with each copy before it is tried.
    """

    normalized: Callable[[Any], Tensor]
    weight: Callable[[Any], Tensor]
    prepare: Callable[[Any], None] = lambda copied: None

    def results(self, copied: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
        """Return what a copy computes in one forward at a time, and in two forwards before a backward."""
        self.prepare(copied)
        randomize(copied)
        weight = self.weight(copied).requires_grad_()
        values = weight.detach().clone()
        state = [tensor for tensor in (*copied.parameters(), *copied.buffers()) if tensor is not weight]
        found: list[Tensor] = []
        for scale in _SCALES:
            with torch.no_grad():
                weight.copy_(scale * values)
            for training in (True, True, False):
                copied.train(training)
                if scale == 1:
                    found += derivatives(lambda _: self.normalized(copied), weight)
                else:
                    with torch.no_grad():
                        found.append(self.normalized(copied).clone())
                found += [tensor.detach().clone() for tensor in state]
        return found, _after_two_forwards(lambda _: self.normalized(copied), copied, weight)


def _after_two_forwards(normalized: Callable[[Tensor], Tensor], copied: nn.Module, weight: Tensor) -> list[Tensor]:
    """Return derivatives for a backward after two training forwards, or an empty list if the module raises."""
    copied.train()
    found, _ = outcome(partial(derivatives, lambda w: torch.stack([normalized(w), normalized(w)]), weight))
    return found or []


def _replace_if_equal(
    module: nn.Module,
    mixin: type[Replacement],
    attribute: str,
    form: _Form,
    mend: bool,
    hidden: bool = False,
    **settings: Any,
) -> Outcome:
    if not can_become(module, attribute):
        return None, f"its {attribute} is overridden on the instance"
    iterations = next((getattr(module, name) for name in _ITERATIONS if hasattr(module, name)), 1)
    declared = [getattr(module, name) for name in _EPS if hasattr(module, name)]
    if not isinstance(iterations, int) or iterations < 1:
        return None, f"has an unsupported number of power iterations, {iterations!r}"
    reference, failure = outcome(lambda: double(module))
    if failure is None:
        found, failure = outcome(lambda: form.results(reference))
    if failure:
        return None, f"could not be tried: {failure}"
    if changed := changed_attributes(reference, module):
        return None, f"its {attribute} changes {', '.join(changed)}"
    expected, expected_later = found
    error = math.inf
    for eps, in_evaluation in product(declared or _COMMON_EPS, sorted({iterations, 1}, reverse=True)):
        settings |= {"n_power_iterations": iterations, "in_evaluation": in_evaluation, "eps": float(eps)}
        candidate = double(module)
        become(candidate, mixin, attribute, **copy.copy(settings))
        found, failure = outcome(partial(form.results, candidate))
        if failure:
            return None, f"could not be tried: {failure}"
        actual, later = found
        error = min(error, difference(actual, expected))
        if error <= TOLERANCE:
            differs = bool(expected_later) and not difference(later, expected_later) <= TOLERANCE
            if (differs or hidden) and not mend:
                return None, _WRONG
            become(module, mixin, attribute, **settings)
            equal = f"{attribute} agrees to {error:.0e} up to the second order"
            return "fused spectral norm", f"{equal}; {_MENDED}" if differs or hidden else equal
    return None, f"its {attribute} differs from fastgan's spectral norm by {error:.1e}"
