"""Spectral normalization as a parametrization: PyTorch's own, with one fused call in its forward."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _SpectralNorm

from fastgan import backends
from fastgan.nn.utils.ready import is_recomputing, read
from fastgan.ops.spectral_norm import fits, normalize

M = TypeVar("M", bound=nn.Module)


class SpectralNorm(_SpectralNorm):
    """weight -> weight / sigma(weight); buffers ``_u`` and ``_v`` as PyTorch keeps them.

    Where PyTorch's changes u and v again when a checkpointed forward is recomputed in backward, this uses those of
    the forward. What the kernels do not take, and what a tracer records, PyTorch's own forward computes.
    """

    is_idle = False  # the last forward of the model has not read the weight

    def forward(self, weight: Tensor) -> Tensor:
        if self.is_idle and not torch.compiler.is_compiling():
            del self.is_idle
        if weight.ndim == 1 or leaves_to_pytorch(weight, self._u, self._v, self.dim):
            return super().forward(weight)
        renew = self.training and not is_recomputing()
        return normalize(
            [weight], [self._u], [self._v], [self.dim], self.n_power_iterations if renew else 0, self.eps, v_first=False
        )[0]

    def extra_repr(self) -> str:
        iterations = f"n_power_iterations={self.n_power_iterations}, " if hasattr(self, "n_power_iterations") else ""
        return f"{iterations}dim={self.dim}, eps={self.eps}"


def leaves_to_pytorch(weight: Tensor, u: Tensor, v: Tensor, dim: int) -> bool:
    """Whether PyTorch's own operations must normalize this weight.

    They are what a tracer may record and what transforms of torch.func see through; and they take, or refuse in their
    own words, complex and integer weights, tensor subclasses, empty weights and vectors of another dtype or device.
    """
    return not backends.is_plain() or not fits([weight], [u], [v], [dim])


def spectral_norm(
    module: M, name: str = "weight", n_power_iterations: int = 1, eps: float = 1e-12, dim: int | None = None
) -> M:
    """Normalize a parameter by its spectral norm: a drop-in for ``torch.nn.utils.parametrizations.spectral_norm``.

    Same arguments, buffers, state_dict keys, training and eval behavior and errors; one fused call instead of about
    forty. The module can be pickled and deep-copied at any time.

    Args:
        module: holds the parameter; of any shape of two dimensions or more is normalized by power iteration, of one
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

    Pickle, which cannot name that class, is told how to make it; and a weight that a model's forward has made ready is
    returned as it is, past the modules that would compute it.
    """
    cls = type(module)
    computed = getattr(cls, name)  # the property, which a class of FSDP2's inherits
    cls.__reduce_ex__ = _reduce  # type: ignore[method-assign, assignment]
    if getattr(computed.fget, "__module__", "") == __name__:
        return

    @torch.jit.unused
    def weight(self: nn.Module) -> Tensor:
        tensors: Any = self._modules["parametrizations"]._modules[name]  # type: ignore[union-attr]
        caches = parametrize._cache_enabled and torch._C._get_tracing_state() is None  # PyTorch's refuses to be traced
        found = parametrize._cache.get((id(self), name)) if caches else None
        if found is None:
            found = read(self, name, tensors._parameters.get("original"), tensors._modules["0"].training)
            if not caches:
                return computed.fget(self) if found is None else found
            # PyTorch's own key is the module that was parametrized, of its copies too, which then get its weight.
            found = parametrize._cache[id(self), name] = tensors() if found is None else found
        return found

    setattr(cls, name, property(weight, computed.fset))


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
