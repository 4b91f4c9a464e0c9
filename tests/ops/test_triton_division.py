"""A GPU divides by a rounded reciprocal. Means far from zero must keep their digits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastgan import ops
from tests.harness import relative_error

interpreter = pytest.importorskip("triton.runtime.interpreter")

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter's division is replaced")


@pytest.fixture(params=[-np.inf, None, np.inf], ids=["a bit less", "exact", "a bit more"])
def reciprocal(request, monkeypatch):
    def divide(self, left, right):
        a, b = left.data, right.data
        if a.dtype == np.float32:
            with np.errstate(divide="ignore", invalid="ignore"):
                one_over = (np.float32(1) / b).astype(np.float32)
                if request.param is not None:
                    one_over = np.nextafter(one_over, np.float32(request.param))
                return interpreter.TensorHandle((a * one_over).astype(np.float32), left.dtype.scalar)
        return interpreter.TensorHandle(a / b, left.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fdiv", divide)


@pytest.mark.parametrize(
    ("shape", "normalize"),
    [
        ((5, 3, 7, 5), lambda x, backend: ops.batch_norm(x, None, None, training=True, backend=backend)),
        ((3, 12, 5, 7), lambda x, backend: ops.group_norm(x, 4, backend=backend)),
        ((5, 3, 7, 5), lambda x, backend: ops.layer_norm(x, x.shape[1:], backend=backend)),
    ],
    ids=["batch", "group, channels_last", "layer"],
)
def test_a_mean_far_from_zero_keeps_its_digits(shape, normalize, reciprocal, monkeypatch):
    monkeypatch.setattr(ops.norm, "_LEAST", 0)
    x = (torch.randn(shape) + 1000).contiguous(memory_format=torch.channels_last)
    assert relative_error(normalize(x, "triton"), normalize(x.double(), "reference")) < 3e-5


@pytest.mark.parametrize("samples", [3, 7])
def test_samples_that_are_equal_deviate_by_nothing(samples, reciprocal):
    x = torch.full((samples, 4), 1000.3)
    statistic = ops.minibatch_stddev(x, group_size=samples, eps=1e-8, backend="triton")[:, -1]
    torch.testing.assert_close(statistic, torch.full((samples,), 1e-4), rtol=1e-3, atol=0)
