"""Recurrent layers on CUDA: cuDNN's kernels have no second derivative, and PyTorch's own have every order."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor


@cache
def _say_once() -> None:
    warnings.warn(
        "a recurrent layer on CUDA runs without cuDNN where it is differentiated twice: cuDNN has no second derivative "
        "of it. This takes longer, and is said once",
        stacklevel=4,
    )


def without_cudnn(theirs: Callable[..., Any]) -> Callable[..., Any]:
    """``theirs``, for whose call alone cuDNN is switched off where it would run."""

    def route(input: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not input.is_cuda or not torch.backends.cudnn.enabled:
            return theirs(input, *args, **kwargs)
        _say_once()
        with torch.backends.cudnn.flags(enabled=False):
            return theirs(input, *args, **kwargs)

    return route


ROUTES: dict[Any, Callable[..., Any]] = {
    theirs: without_cudnn(theirs) for theirs in (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)
}
