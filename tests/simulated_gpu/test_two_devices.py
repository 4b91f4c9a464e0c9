"""Two devices: tensors, launches and streams belong to one of them."""

from __future__ import annotations

import pytest
import torch

import fastgan
from fastgan import ops

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs SIMULATED_GPU_DEVICES=2")


def test_tensors_of_two_devices_do_not_meet():
    a, b = torch.ones(3, device="cuda:0"), torch.ones(3, device="cuda:1")
    with pytest.raises(RuntimeError, match="at least two devices, cuda:0 and cuda:1"):
        a + b
    assert (a + b.to("cuda:0")).tolist() == [2, 2, 2]


def test_each_device_has_its_current_stream():
    stream = torch.cuda.Stream("cuda:1")
    with torch.cuda.stream(stream):
        assert torch.cuda.current_stream("cuda:1") == stream
        assert torch.cuda.current_stream("cuda:0") == torch.cuda.default_stream("cuda:0")
        assert torch.cuda.current_device() == 1
    assert torch.cuda.current_device() == 0


def test_a_triton_kernel_is_launched_on_its_tensors_device():
    triton = pytest.importorskip("triton")
    import triton.language as tl

    @triton.jit
    def double(x, BLOCK: tl.constexpr):
        offsets = tl.arange(0, BLOCK)
        tl.store(x + offsets, 2 * tl.load(x + offsets))

    x = torch.ones(4, device="cuda:1")
    with pytest.raises(RuntimeError, match="launched on cuda:0, and a tensor is on cuda:1"):
        double[(1,)](x, BLOCK=4)
    with torch.cuda.device(1):
        double[(1,)](x, BLOCK=4)
    assert x.tolist() == [2, 2, 2, 2]
    with pytest.raises(ValueError, match="cpu tensor"):
        double[(1,)](torch.ones(4), BLOCK=4)


def test_fastgans_operations_work_on_the_second_device():
    """While the first is the current one: every launch has to change the device."""
    x = torch.randn(4, 6, 3, 3, device="cuda:1", requires_grad=True)
    weight = torch.randn(6, 27, device="cuda:1")
    u, v = torch.randn(6, device="cuda:1"), torch.randn(27, device="cuda:1")
    with fastgan.use_backend("triton"):
        y = ops.bias_act(x, torch.ones(6, device="cuda:1"), activation="leaky_relu")
        y = ops.minibatch_stddev(ops.group_norm(y, 2), group_size=2)
        similar = ops.minibatch_discrimination(y.mean((2, 3)).view(4, 7, 1).contiguous())
        (grad,) = torch.autograd.grad(similar.sum() + y.square().sum(), x)
        (normalized,) = ops.spectral_norm([weight], [u], [v])
    assert {t.device for t in (y, similar, grad, normalized)} == {torch.device("cuda:1")}
    assert torch.cuda.current_device() == 0
