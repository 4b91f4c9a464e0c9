"""Convert spectral normalization from other codebases: a method that returns the weight, or a wrapper module.

    method     The module has a weight, a buffer (1, out) for u and a buffer (1) for sigma: u0 and sv0 with W_() in the
               style of BigGAN, or sn_u and sn_sigma. It updates v first, then u. In evaluation it also iterates, but
               does not store the result. BigGAN iterates once there, whatever the number of iterations is.
    wrapper    It wraps a module whose weight_bar, weight_u and weight_v are parameters, or has w_bar, u and v itself,
               as torchgan's, and iterates at each forward. It overwrites u and v, so a backward after two forwards
               reads the wrong ones.

Names only find candidates. A module is replaced if its weight, its buffers and the derivatives up to the second equal
fastgan's on random values, in training and in evaluation. If only the gradients after two forwards differ, a
replacement changes the training run, so it is made only on request (``mend``).
"""

from __future__ import annotations

import copy
import inspect
import math
import re
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastgan import ops
from fastgan.convert.probe import TOLERANCE, derivatives, difference, double, outcome, randn
from fastgan.convert.replace import Replacement, become, can_become

Outcome = tuple[str | None, str]

_BUFFERS = (("u0", "sv0"), ("sn_u", "sn_sigma"))
_METHODS = re.compile(r"W_|W_bar|sn_weights?|\w*normali[sz]ed?_?weights?|weights?_?(sn|normali[sz]ed)", re.IGNORECASE)
_ITERATIONS = ("num_itrs", "num_iters", "n_power_iterations", "power_iterations", "n_iter", "Ip")
_EPS = ("eps", "epsilon")
_COMMON_EPS = (1e-12, 1e-6, 1e-8)
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
                # W v = sigma u. One row gives sigma; take the row with the largest element of u.
                row = u.abs().argmax().view(1)
                product = weight.flatten(1).index_select(0, row) @ v
                getattr(self, settings["sigma"]).copy_(product / u.index_select(0, row))
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

    def results(copied: Any) -> tuple[list[Tensor], list[Tensor]]:
        def normalized(weight: Tensor) -> Tensor:
            found = getattr(copied, attribute)
            return cast(Tensor, found() if callable(found) else found)

        copied.weight.requires_grad_()
        getattr(copied, u).copy_(randn(1, weight.shape[0]))
        found: list[Tensor] = []
        for training in (True, True, False):
            copied.train(training)
            found += derivatives(normalized, copied.weight)
            found += [getattr(copied, name).clone() for name in (u, sigma)]
        return found, _after_two_forwards(normalized, copied, copied.weight)

    return _replace_if_equal(module, _Method, attribute, results, mend, u=u, sigma=sigma)


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

    def results(copied: Any) -> tuple[list[Tensor], list[Tensor]]:
        child = copied.module
        weight, u, v = (getattr(child, copied.name + suffix) for suffix in ("_bar", "_u", "_v"))

        def normalized(weight: Tensor) -> Tensor:
            getattr(copied, attribute)()
            return cast(Tensor, getattr(child, copied.name))

        weight.requires_grad_()
        with torch.no_grad():
            for i, vector in enumerate((u, v)):
                vector.copy_(nn.functional.normalize(randn(*vector.shape, seed=i), dim=0))
        found: list[Tensor] = []
        for training in (True, True, False):
            copied.train(training)
            found += derivatives(normalized, weight)
            found += [u.detach().clone(), v.detach().clone()]
        return found, _after_two_forwards(normalized, copied, weight)

    # A weight with one row or column has one pair of singular vectors, so the comparison cannot show the overwriting.
    return _replace_if_equal(module, _Wrapper, attribute, results, mend, hidden=1 in weight.flatten(1).shape)


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
    hooks: list[bool] = []  # for each forward, whether the inner module's hooks ran

    def results(copied: Any) -> tuple[list[Tensor], list[Tensor]]:
        shown = copied.module = _Shown(name)
        called: list[object] = []
        shown.register_forward_pre_hook(lambda *_: called.append(None))

        def normalized(w: Tensor) -> Tensor:
            weight = copied.forward(1, 2)
            if shown.arguments[-1] != (1, 2):
                raise ValueError("its forward does not pass its arguments on")
            return cast(Tensor, weight)

        copied.w_bar.requires_grad_()
        with torch.no_grad():
            for i, vector in enumerate((copied.u, copied.v)):
                vector.copy_(nn.functional.normalize(randn(*vector.shape, seed=i), dim=0))
        found: list[Tensor] = []
        for training in (True, True, False):
            copied.train(training)
            found += derivatives(normalized, copied.w_bar)
            found += [copied.u.detach().clone(), copied.v.detach().clone()]
        hooks.append(bool(called))
        return found, _after_two_forwards(normalized, copied, copied.w_bar)

    outcome(lambda: results(double(module)))
    settings = {"hooks": hooks[0] if hooks else True, "hidden": 1 in module.w_bar.flatten(1).shape}
    return _replace_if_equal(module, _WholeForward, "forward", results, mend, **settings)


def _after_two_forwards(normalized: Callable[[Tensor], Tensor], copied: nn.Module, weight: Tensor) -> list[Tensor]:
    """Return derivatives for a backward after two training forwards, or an empty list if the module raises."""
    copied.train()
    found, _ = outcome(partial(derivatives, lambda w: torch.stack([normalized(w), normalized(w)]), weight))
    return found or []


def _replace_if_equal(
    module: nn.Module,
    mixin: type[Replacement],
    attribute: str,
    results: Any,
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
    found, failure = outcome(lambda: results(double(module)))
    if failure:
        return None, f"could not be tried: {failure}"
    expected, expected_later = found
    error = math.inf
    for eps, in_evaluation in product(declared or _COMMON_EPS[:1], sorted({iterations, 1}, reverse=True)):
        settings |= {"n_power_iterations": iterations, "in_evaluation": in_evaluation, "eps": float(eps)}
        candidate = double(module)
        become(candidate, mixin, attribute, **copy.copy(settings))
        found, failure = outcome(partial(results, candidate))
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
