"""Spectral normalisation as a parametrization: PyTorch's own, with one fused call in its forward."""

from __future__ import annotations

from threading import get_ident
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _SpectralNorm

from fastgan import backends, ops
from fastgan.ops.library import checkpointed_region

M = TypeVar("M", bound=nn.Module)


class SpectralNorm(_SpectralNorm):
    """weight -> weight / sigma(weight); buffers ``_u`` and ``_v`` as PyTorch keeps them.

    Where PyTorch's changes u and v again when a checkpointed forward is recomputed in backward, this uses those of
    the forward.
    """

    is_renewed = False  # for this forward: u and v stay as they are

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
            update=self.training and not self.is_renewed and not is_recomputing(),
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


class Ready(NamedTuple):
    """A weight that a model's forward has normalised for one of its layers."""

    weight: Tensor
    original: Tensor
    version: int  # of the original then
    thread: int  # whose forward it is: another one has a forward of its own, with or without a graph; 0: anybody's
    region: object | None  # of torch.utils.checkpoint that it was made in

    def is_valid(self) -> bool:
        """For who asks now."""
        return self.thread == 0 or (self.thread == get_ident() and self.version == self.original._version)

    def is_mine(self) -> bool:
        return self.thread == 0 or self.thread == get_ident()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # in a copy of a model whose forward was broken off


def ready(weight: Tensor, original: Tensor, thread: int, region: object | None) -> Ready:
    if thread == 0 or original.is_inference():  # which has no versions
        return Ready(weight, original, 0, 0, region)
    return Ready(weight, original, original._version, thread, region)


def thread_and_region() -> tuple[int, object | None]:
    """Those of now; a graph that is traced takes its weights away itself."""
    return (0, None) if torch.compiler.is_compiling() else (get_ident(), checkpointed_region())


def adapt(module: nn.Module, name: str) -> None:
    """Give the class that PyTorch makes for a parametrized module what it lacks.

    Pickle, which cannot name that class, is told how to make it; and a weight that `put` has left there is returned as
    it is, past the modules that would compute it.
    """
    cls, key = type(module), _key(name)
    computed = getattr(cls, name)  # the property, which a class of FSDP2's inherits
    cls.__reduce_ex__ = _reduce  # type: ignore[method-assign, assignment]

    def weight(self: nn.Module) -> Tensor:
        there: Ready | None = self.__dict__.get(key)
        if there is None or not there.is_valid():
            return computed.fget(self)  # type: ignore[no-any-return]
        if there.thread == 0 or there.region is checkpointed_region():
            return there.weight
        # Checkpointing runs this part of the forward again, and not what made the weight: both times, of the same u, v.
        norm: SpectralNorm = self.parametrizations[name][0]  # type: ignore[index, assignment]
        norm.is_renewed = True
        try:
            return computed.fget(self)  # type: ignore[no-any-return]
        finally:
            norm.is_renewed = False

    if getattr(computed.fget, "__module__", "") != __name__:
        setattr(cls, name, property(weight, computed.fset))


def put(module: nn.Module, name: str, ready: Ready) -> None:
    """Let ``module.<name>`` be this weight in this thread until `take` removes it."""
    module.__dict__[_key(name)] = ready


def take(module: nn.Module, name: str) -> None:
    there: Ready | None = module.__dict__.pop(_key(name), None)
    if there is not None and not there.is_mine():
        put(module, name, there)


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
