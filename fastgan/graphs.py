"""A whole training step as one CUDA graph: losses, penalty, backward and optimizer in one launch."""

from __future__ import annotations

import random
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from fastgan.ops.gradient_penalty.small import at_any_size

_MOST_CAPTURES = 4
_CHANGES = (
    "make the learning rate a tensor, lr=torch.tensor(1e-4, device='cuda'), so that a graph can read its new value"
)


class GraphedStep:
    """The result of ``graphed_step``.

    Attributes:
        reason: why the step runs without a graph; None if it runs, or will run, as a graph.
    """

    def __init__(
        self,
        step: Callable[..., Any],
        example_inputs: Sequence[Tensor],
        warmup: int,
        modules: Sequence[nn.Module],
        optimizers: Sequence[Optimizer],
    ) -> None:
        self._step, self._warmup, self._modules, self._optimizers = step, warmup, modules, optimizers
        self._device = example_inputs[0].device
        self._examples = [torch.empty_like(x) for x in example_inputs]  # where a replay reads its inputs
        self._calls = self._captures = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._outputs: Any = None
        self._constants: Any = None
        self._grads: list[tuple[Tensor, Tensor | None]] = []  # where a replay leaves the gradients
        self.reason = _why_not(example_inputs, modules, optimizers)

    def __call__(self, *inputs: Tensor) -> Any:
        if not self._fits(inputs) or self.reason is not None:
            return self._step(*inputs)
        if self._calls < self._warmup:
            self._calls += 1
            return self._on_side_stream(inputs)
        for static, given in zip(self._examples, inputs, strict=True):
            static.copy_(given, non_blocking=True)
        constants = self._find_constants()
        if self._graph is None or constants != self._constants:
            self._capture(constants)
            if self._graph is None:
                return self._step(*inputs)
        with torch.cuda.device(self._device):
            self._graph.replay()
        for parameter, grad in self._grads:  # a step without the graph, or zero_grad, may have replaced it
            if parameter.grad is not grad:
                parameter.grad = grad
        return tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, self._outputs)

    def _fits(self, inputs: Sequence[Tensor]) -> bool:
        """Return whether the inputs have the shapes of the graph. The last batch of an epoch may be smaller."""
        if len(inputs) != len(self._examples):
            raise TypeError(f"the step was graphed with {len(self._examples)} inputs, got {len(inputs)}")
        for x in inputs:
            if not isinstance(x, Tensor):
                raise TypeError(f"the inputs of a graphed step must be tensors, got {type(x).__name__}")
        return all(
            x.shape == example.shape and x.dtype == example.dtype
            for x, example in zip(inputs, self._examples, strict=True)
        )

    def _on_side_stream(self, inputs: Sequence[Tensor]) -> Any:
        """Run a normal training step on a side stream, as PyTorch requires before a capture."""
        stream, current = torch.cuda.Stream(self._device), torch.cuda.current_stream(self._device)
        before = _host_random_state()
        stream.wait_stream(current)
        with torch.cuda.stream(stream), at_any_size():
            outputs = self._step(*inputs)
        current.wait_stream(stream)
        if _host_random_state() != before:
            self._give_up("it draws random numbers on the host, which a replay would repeat: draw them on the device")
        return outputs

    def _capture(self, constants: Any) -> None:
        self._graph = None
        if self._captures == _MOST_CAPTURES:
            self._give_up(f"the optimizer's settings have changed {_MOST_CAPTURES} times: {_CHANGES}")
            return
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.device(self._device), at_any_size(), torch.cuda.graph(graph):
                outputs = self._step(*self._examples)
        except RuntimeError as error:
            first, *_ = str(error).splitlines() or [type(error).__name__]
            self._give_up(f"its capture failed: {first}")
            return
        self._captures += 1
        self._grads = [(p, p.grad) for module in self._modules for p in module.parameters()]
        self._graph, self._constants = graph, constants
        self._outputs = tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, outputs)

    def _give_up(self, reason: str) -> None:
        self.reason, self._graph, self._outputs, self._grads = reason, None, None, []
        warnings.warn(f"the step runs without a CUDA graph: {reason}", stacklevel=4)

    def _find_constants(self) -> Any:
        """Return the numbers and modes that are constants in a graph."""
        groups = (group for optimizer in self._optimizers for group in optimizer.param_groups)
        settings = [
            {name: value for name, value in group.items() if isinstance(value, int | float | tuple)} for group in groups
        ]
        return settings, [module.training for module in self._modules]


def graphed_step(
    step: Callable[..., Any],
    example_inputs: Sequence[Tensor],
    *,
    modules: Iterable[nn.Module],
    optimizers: Iterable[Optimizer],
    warmup: int = 3,
) -> GraphedStep:
    """Capture a training step in one CUDA graph. A replay launches all kernels at once, without Python in between.

    The first ``warmup`` calls run the step without a graph. The next call captures it, and all later calls replay it.
    Each of these calls is a normal training step. Outputs are copies, so you may keep them.

    The step runs without a graph if a replay would be wrong or the capture fails: for an optimizer without
    ``capturable=True``, random numbers drawn on the host, GradientPenalty with ``every`` above 1,
    DistributedDataParallel, and values read by the host (``loss.item()``, GradScaler). A warning and the attribute
    ``reason`` state the reason. A call with other shapes, such as the last batch of an epoch, also runs without the
    graph. If a module's mode or a learning rate that is a number changes, the step is captured again. A learning rate
    that changes at each step must be a tensor. On a CPU there is no graph.

    Example:

    ```python
    import torch
    from torch.nn.functional import softplus
    import fastgan

    layers = torch.nn.Conv2d(3, 8, 4), torch.nn.ReLU(), torch.nn.Flatten()
    discriminator = torch.nn.Sequential(*layers)
    optimizer = torch.optim.Adam(
        discriminator.parameters(), capturable=torch.cuda.is_available()
    )

    def step(real, fake):
        optimizer.zero_grad()
        logits, penalty = fastgan.logits_and_penalty(discriminator, real, kind="r1")
        loss = softplus(-logits).mean() + softplus(discriminator(fake)).mean() + penalty
        loss.backward()
        optimizer.step()
        return loss

    real, fake = torch.randn(2, 8, 3, 4, 4)
    d_step = fastgan.graphed_step(
        step, (real, fake), modules=[discriminator], optimizers=[optimizer]
    )
    loss = d_step(real, fake)
    ```

    Args:
        step: a function of tensors. It clears gradients, computes the losses, runs backward and steps its optimizers.
        example_inputs: tensors with the shapes, dtypes and device of the step's inputs. Their values are not read.
        modules: all modules that the step runs.
        optimizers: all optimizers that the step calls.
        warmup: number of calls before the capture, at least 1. PyTorch recommends 3.

    Returns:
        A callable with the arguments and results of ``step``, and the attribute ``reason``.

    Raises:
        TypeError: an argument has the wrong type. It is checked on every device.
        ValueError: there are no examples, they are on several devices, or ``warmup`` is less than 1.
    """
    if not callable(step):
        raise TypeError(f"step must be callable, got {type(step).__name__}")
    if isinstance(example_inputs, Tensor):
        raise TypeError("example_inputs must be a sequence of tensors, got one tensor: pass (x,)")
    examples, modules, optimizers = list(example_inputs), list(modules), list(optimizers)
    for x in examples:
        if not isinstance(x, Tensor):
            raise TypeError(f"example_inputs must be tensors, got {type(x).__name__}")
    for module in modules:
        if not isinstance(module, nn.Module):
            raise TypeError(f"modules must be of type nn.Module, got {type(module).__name__}")
    for optimizer in optimizers:
        if not hasattr(optimizer, "param_groups"):  # frameworks wrap optimizers in other classes
            raise TypeError(f"optimizers must have param_groups, got {type(optimizer).__name__}")
    if not examples:
        raise ValueError("example_inputs must hold at least one tensor")
    if len({x.device for x in examples}) > 1:
        raise ValueError(f"example_inputs must be on one device, got {', '.join(str(x.device) for x in examples)}")
    if warmup < 1:
        raise ValueError(f"warmup must be at least 1, got {warmup}")
    graphed = GraphedStep(step, examples, warmup, modules, optimizers)
    if graphed.reason is not None and examples[0].is_cuda:
        warnings.warn(f"the step runs without a CUDA graph: {graphed.reason}", stacklevel=2)
    return graphed


def _why_not(examples: Sequence[Tensor], modules: Sequence[nn.Module], optimizers: Sequence[Optimizer]) -> str | None:
    if not examples[0].is_cuda:
        return f"its inputs are on the device {examples[0].device}"
    for optimizer in optimizers:
        if any(group.get("capturable") is False for group in optimizer.param_groups):
            return f"{type(optimizer).__name__} counts its steps on the host: construct it with capturable=True"
    for module in modules:
        if any(isinstance(part, DistributedDataParallel) for part in module.modules()):
            return "DistributedDataParallel reduces gradients from hooks of the host"
    return None


def _host_random_state() -> tuple[Any, ...]:
    numpy = sys.modules.get("numpy")
    drawn = () if numpy is None else (numpy.random.get_state()[1].tobytes(), numpy.random.get_state()[2])
    return random.getstate(), torch.get_rng_state().tolist(), drawn
