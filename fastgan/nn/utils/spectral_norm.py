"""Spectral normalisation as a parametrization: PyTorch's own, with one fused call in its forward."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _SpectralNorm

from fastgan import backends, ops

M = TypeVar("M", bound=nn.Module)


class SpectralNorm(_SpectralNorm):
    """weight -> weight / sigma(weight); buffers ``_u`` and ``_v`` as PyTorch keeps them.

    Where PyTorch's changes u and v again when a checkpointed forward is recomputed in backward, this uses those of
    the forward.
    """

    def forward(self, weight: Tensor) -> Tensor:
        if weight.ndim == 1 or backends.in_transform():  # PyTorch's own renews u and v inside torch.func.grad
            return super().forward(weight)
        return ops.spectral_norm(
            [weight],
            [self._u],
            [self._v],
            dims=[self.dim],
            n_power_iterations=self.n_power_iterations,
            eps=self.eps,
            update=self.training and not is_recomputing(),
        )[0]

    def extra_repr(self) -> str:
        iterations = f"n_power_iterations={self.n_power_iterations}, " if hasattr(self, "n_power_iterations") else ""
        return f"{iterations}dim={self.dim}, eps={self.eps}"


def is_recomputing() -> bool:
    """Whether backward is recomputing a forward (activation checkpointing): then u and v stay those of that forward."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def is_sharded(weight: Tensor) -> bool:
    """Whether this is a rank's part of a weight (a DTensor)."""
    return type(weight) is not nn.Parameter and hasattr(weight, "placements")


def spectral_norm(
    module: M, name: str = "weight", n_power_iterations: int = 1, eps: float = 1e-12, dim: int | None = None
) -> M:
    """Normalise a parameter by its spectral norm: a drop-in for ``torch.nn.utils.parametrizations.spectral_norm``.

    Same arguments, buffers, state_dict keys, training and eval behaviour and errors; one fused call instead of about
    forty. The module can be pickled and deep-copied at any time.

    Args:
        module: holds the parameter; of any shape of two dimensions or more is normalised by power iteration, of one
            dimension by its norm.
        name: the parameter.
        n_power_iterations: power iterations at each training forward.
        eps: least norm that is divided by.
        dim: dimension of the outputs; None: 0, or 1 for a transposed convolution.

    Returns:
        The module.

    Raises:
        ValueError: no such parameter, or ``n_power_iterations`` is not positive.
        IndexError: ``dim`` is out of range.

    Differentiable twice. Source: Miyato et al. (2018).
    """
    weight = getattr(module, name, None)
    if not isinstance(weight, Tensor):
        raise ValueError(f"Module '{module}' has no parameter or buffer with name '{name}'")
    if dim is None:
        dim = int(isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)))
    parametrize.register_parametrization(module, name, SpectralNorm(weight, n_power_iterations, dim, eps))
    adapt(module, name)
    return module


def adapt(module: nn.Module, name: str) -> None:
    """Give the class that PyTorch makes for a parametrized module what it lacks.

    Pickle, which cannot name that class, is told how to make it; and a weight that `put` has left there is returned as
    it is, past the modules that would compute it.
    """
    cls, key = type(module), _key(name)
    computed = getattr(cls, name)  # the property, which a class of FSDP2's inherits
    cls.__reduce_ex__ = _reduce  # type: ignore[method-assign, assignment]

    def weight(self: nn.Module) -> Tensor:
        there: Tensor | None = self.__dict__.get(key)
        return computed.fget(self) if there is None else there

    if getattr(computed.fget, "__module__", "") != __name__:
        setattr(cls, name, property(weight, computed.fset))


def put(module: nn.Module, name: str, weight: Tensor) -> None:
    """Let ``module.<name>`` be this weight until `take` removes it."""
    module.__dict__[_key(name)] = weight


def take(module: nn.Module, name: str) -> None:
    module.__dict__.pop(_key(name), None)


def _key(name: str) -> str:
    return f"_normalised_{name}"


def _reduce(module: nn.Module, protocol: int) -> tuple[Any, ...]:
    base = parametrize.type_before_parametrizations(module)
    names = tuple(module.parametrizations)  # type: ignore[arg-type]
    return _rebuild, (base, names), module.__dict__


def _rebuild(base: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    module = base.__new__(base)
    parametrize._inject_new_class(module)
    for name in names:
        parametrize._inject_property(module, name)
        adapt(module, name)
    return module
