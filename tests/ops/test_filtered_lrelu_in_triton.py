"""filtered_lrelu's kernel in Triton: values, a gradient, its bits, and its operator."""

from __future__ import annotations

import pytest
import torch

from fastgan import ops
from tests.harness import assert_close
from tests.ops.test_stylegan_ops import FD, FU


@pytest.mark.parametrize(
    ("dtype", "clamp"), [(torch.bfloat16, 0.3), pytest.param(torch.float32, None, marks=pytest.mark.long)], ids=str
)
def test_filtered_lrelu_in_triton_keeps_two_bits_of_the_upsampled_image(dtype, clamp):
    pytest.importorskip("triton", reason="Triton is not installed")
    x = torch.randn(1, 1, 13, 11).to(dtype)
    options = dict(up=2, down=2, padding=5, clamp=clamp)
    saved = []

    def ran(x, backend):
        x = x.clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            y = ops.filtered_lrelu(x, FU, FD, **options, backend=backend)
        (grad,) = torch.autograd.grad(y.square().sum(), x)
        return y, grad

    expected, reference = ran(x.double(), "reference"), ran(x, "reference")
    saved.clear()
    actual = ran(x, "triton")
    (bits,) = [t for t in saved if t is not None]
    assert bits.dtype == torch.uint8
    assert bits.numel() == 8 * 27  # a byte has four of a column's 31 elements
    for order, (got, want, same_dtype) in enumerate(zip(actual, expected, reference, strict=True)):
        assert_close(got, want, order=order, reference=same_dtype)


def test_filtered_lrelus_operator_in_triton_tells_its_schema():
    pytest.importorskip("triton", reason="Triton is not installed")
    x, z = torch.randn(1, 1, 4, 5), torch.empty(1, 1, 8, 10)
    bits = torch.empty(2 * 10, dtype=torch.uint8)
    sizes = [1, 1, 4, 5, 8, 10, 2, 2, 1, 1, 1, 1, 3, 3]
    arguments = (x, torch.randn(1), z, bits, False, sizes, True, [1.0, 2.0, 1.0] * 2, 0.2, 1.5, float("inf"))
    operator = torch.ops.fastgan.filtered_lrelu_activated.default
    torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))
