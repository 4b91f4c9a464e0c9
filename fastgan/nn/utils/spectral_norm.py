"""Spectral normalization as a parametrization: PyTorch's own class with a fused forward."""

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
    """Parametrization weight -> weight / sigma(weight), with the buffers ``_u`` and ``_v`` of PyTorch's class.

    When activation checkpointing recomputes a forward in backward, PyTorch's class updates u and v again. This class
    reuses those of the forward. PyTorch's own forward runs for weights that the kernels do not support and under a
    tracer.

    Use `spectral_norm` to add it to a module.

    Order of derivative: two. A third derivative raises; ``use_backend("reference")`` has every order.

    ```python
    import torch
    import fastgan

    layer = torch.nn.Linear(4, 3)
    norm = fastgan.nn.utils.SpectralNorm(layer.weight)
    torch.nn.utils.parametrize.register_parametrization(layer, "weight", norm)
    y = layer(torch.randn(2, 4))
    ```

    Args:
        weight: the weight, of any shape; float16, bfloat16, float32 or float64. The u and v of the power iteration are
            initialized from it.
        n_power_iterations: power iterations in each training forward.
        dim: dimension of the outputs.
        eps: lower bound of the norms in the divisions.

    Raises:
        ValueError: ``n_power_iterations`` is not positive.
        IndexError: ``dim`` is out of range.
    """

    is_idle = False  # True if the last forward of the model has not read the weight

    def forward(self, weight: Tensor) -> Tensor:
        if self.is_idle and not torch.compiler.is_compiling():
            del self.is_idle
        if weight.ndim == 1 or needs_pytorch(weight, self._u, self._v, self.dim):
            return super().forward(weight)
        n = self.n_power_iterations if self.training and not is_recomputing() else 0
        return normalize([weight], [self._u], [self._v], [self.dim], n, self.eps, v_first=False)[0]

    def extra_repr(self) -> str:
        iterations = f"n_power_iterations={self.n_power_iterations}, " if hasattr(self, "n_power_iterations") else ""
        return f"{iterations}dim={self.dim}, eps={self.eps}"


def needs_pytorch(weight: Tensor, u: Tensor, v: Tensor, dim: int) -> bool:
    """Return whether PyTorch's own operations must normalize this weight.

    Tracers and transforms of torch.func need PyTorch's operations. These operations also support, or reject with their
    own errors, complex and integer weights, tensor subclasses, empty weights, and vectors with another dtype or device.
    """
    return not backends.is_plain() or not fits([weight], [u], [v], [dim])


def spectral_norm(
    module: M, name: str = "weight", n_power_iterations: int = 1, eps: float = 1e-12, dim: int | None = None
) -> M:
    """Normalize a parameter by its spectral norm: a drop-in for ``torch.nn.utils.parametrizations.spectral_norm``.

    Arguments, buffers, state_dict keys, training and evaluation behavior, and errors are the same. One fused call
    replaces 17 operators per layer. The module can be pickled and deep-copied at any time.
    The parameter is float16, bfloat16, float32 or float64, and the normalized weight has its shape and dtype.

    Order of derivative: two, in the weight. A third derivative raises; ``use_backend("reference")`` has every order.

    Source: Miyato et al., Spectral Normalization for Generative Adversarial Networks (2018).

    ```python
    import torch
    import fastgan

    layer = fastgan.nn.utils.spectral_norm(torch.nn.Conv2d(3, 64, 3))
    y = layer(torch.randn(2, 3, 16, 16))
    ```

    Args:
        module: the module that holds the parameter. A parameter with two or more dimensions is normalized by power
            iteration, and one with a single dimension by its norm.
        name: name of the parameter.
        n_power_iterations: power iterations in each training forward.
        eps: lower bound of the norms in the divisions.
        dim: dimension of the outputs. None: 1 for a transposed convolution, 0 otherwise.

    Returns:
        The module itself.

    Raises:
        ValueError: the module has no such parameter, or ``n_power_iterations`` is not positive.
        IndexError: ``dim`` is out of range.
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
    """Extend the class that PyTorch creates for a parametrized module.

    Pickle cannot look up that class by name, so ``__reduce_ex__`` recreates it. The property of the weight returns a
    weight that the model's forward has prepared, without calling the modules that would compute it.
    """
    cls = type(module)
    computed = getattr(cls, name)  # PyTorch's property; a class made by FSDP2 inherits it
    cls.__reduce_ex__ = _reduce  # type: ignore[method-assign, assignment]
    if getattr(computed.fget, "__module__", "") == __name__:
        return

    @torch.jit.unused
    def weight(self: nn.Module) -> Tensor:
        tensors: Any = self._modules["parametrizations"]._modules[name]  # type: ignore[union-attr]
        caches = (
            parametrize._cache_enabled and torch._C._get_tracing_state() is None
        )  # PyTorch's cache cannot be traced
        found = parametrize._cache.get((id(self), name)) if caches else None
        if found is None:
            found = read(self, name, tensors._parameters.get("original"), tensors._modules["0"].training)
            if not caches:
                return computed.fget(self) if found is None else found
            # PyTorch's own key is the original module even for copies of it, which would then get its weight.
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
