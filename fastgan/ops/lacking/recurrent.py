"""Recurrent layers on CUDA. cuDNN's kernels have no second derivative; PyTorch's own kernels have all orders."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor


@cache
def _warn_once() -> None:
    warnings.warn(
        "a recurrent layer on CUDA runs without cuDNN inside a penalty, because cuDNN has no second derivative. This "
        "is slower. This warning is shown once",
        stacklevel=4,
    )


def without_cudnn(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``function`` with cuDNN switched off during its calls if cuDNN would run."""

    def route(input: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not input.is_cuda or not torch.backends.cudnn.enabled:
            return function(input, *args, **kwargs)
        _warn_once()
        with torch.backends.cudnn.flags(enabled=False):
            return function(input, *args, **kwargs)

    return route


ROUTES: dict[Any, Callable[..., Any]] = {
    function: without_cudnn(function) for function in (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)
}
