"""A whole training step as one CUDA graph: losses, penalty, backward and optimizer, replayed by one launch."""

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

_MOST_CAPTURES = 4
_CHANGES = (
    "make the learning rate a tensor, lr=torch.tensor(1e-4, device='cuda'), so that a graph can read its new value"
)


class GraphedStep:
    """The result of ``graphed_step``.

    Attributes:
        reason: why the step runs as it was given; None where it is, or will be, a graph.
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
        self.reason = _why_not(example_inputs, modules, optimizers)

    def __call__(self, *inputs: Tensor) -> Any:
        if self.reason is not None or not self._fits(inputs):
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
        return tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, self._outputs)

    def _fits(self, inputs: Sequence[Tensor]) -> bool:
        """Whether these have the shapes of the graph; the last batch of an epoch may be smaller."""
        if len(inputs) != len(self._examples):
            raise TypeError(f"the step was graphed with {len(self._examples)} inputs, got {len(inputs)}")
        return all(
            x.shape == example.shape and x.dtype == example.dtype
            for x, example in zip(inputs, self._examples, strict=True)
        )

    def _on_side_stream(self, inputs: Sequence[Tensor]) -> Any:
        """Run a step as PyTorch asks for before a capture. It is a step of the training like any other."""
        stream, current = torch.cuda.Stream(self._device), torch.cuda.current_stream(self._device)
        before = _host_random_state()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
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
            with torch.cuda.device(self._device), torch.cuda.graph(graph):
                outputs = self._step(*self._examples)
        except RuntimeError as error:
            first, *_ = str(error).splitlines() or [type(error).__name__]
            self._give_up(f"its capture failed: {first}")
            return
        self._captures += 1
        self._graph, self._constants = graph, constants
        self._outputs = tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, outputs)

    def _give_up(self, reason: str) -> None:
        self.reason, self._graph, self._outputs = reason, None, None
        warnings.warn(f"the step runs without a CUDA graph: {reason}", stacklevel=4)

    def _find_constants(self) -> Any:
        """The numbers and modes that a graph holds as constants."""
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
    """Make a training step one CUDA graph: a replay launches all its kernels at once, with no Python in between.

    The first ``warmup`` calls run the step as it is. The next one captures it, and later ones replay it. All of them
    are steps of the training. Outputs are copies, so that they may be kept.

    The step runs without a graph, with the reason in ``reason`` and in a warning, if a replay would be wrong or the
    capture fails: an optimizer without ``capturable=True``, random numbers drawn on the host, GradientPenalty with
    ``every`` above 1, DistributedDataParallel, values read by the host (``loss.item()``, GradScaler). So does a single
    call with other shapes, such as the last batch of an epoch. If the learning rate (as a number) or a module's mode
    changes, the step is captured again; a learning rate that changes at each step must be a tensor. On a CPU the
    step always runs as it is.

    Example:

    ```python
    import torch
    from torch.nn.functional import softplus
    import fastgan

    discriminator = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 4), torch.nn.ReLU(), torch.nn.Flatten())
    optimizer = torch.optim.Adam(discriminator.parameters(), capturable=torch.cuda.is_available())

    def step(real, fake):
        optimizer.zero_grad()
        logits, penalty = fastgan.logits_and_penalty(discriminator, real, kind="r1", weight=10.0)
        loss = softplus(-logits).mean() + softplus(discriminator(fake)).mean() + penalty
        loss.backward()
        optimizer.step()
        return loss

    real, fake = torch.randn(2, 8, 3, 4, 4)
    d_step = fastgan.graphed_step(step, (real, fake), modules=[discriminator], optimizers=[optimizer])
    loss = d_step(real, fake)
    ```

    Args:
        step: a function of tensors. It clears gradients, computes the losses, runs backward and steps its optimizers.
        example_inputs: tensors of the shapes, dtypes and device that the step will get. Their values are not read.
        modules: all modules that the step runs.
        optimizers: all optimizers that it steps.
        warmup: calls before the capture, at least 1; PyTorch asks for 3.

    Returns:
        A callable with the step's arguments and results.

    Raises:
        TypeError: an example is not a tensor.
        ValueError: there are no examples, they are on several devices, or ``warmup`` is less than 1.
    """
    examples = list(example_inputs)
    for x in examples:
        if not isinstance(x, Tensor):
            raise TypeError(f"example_inputs must be tensors, got {type(x).__name__}")
    if not examples:
        raise ValueError("example_inputs must hold at least one tensor")
    if len({x.device for x in examples}) > 1:
        raise ValueError(f"example_inputs must be on one device, got {', '.join(str(x.device) for x in examples)}")
    if warmup < 1:
        raise ValueError(f"warmup must be at least 1, got {warmup}")
    graphed = GraphedStep(step, examples, warmup, list(modules), list(optimizers))
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
