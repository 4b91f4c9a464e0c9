"""What fastgan launches for a table of inputs, recorded instead of launched."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.jit import JITFunction, create_function_from_signature

from fastgan.ops.bias_act import layout as bias_act_layout
from fastgan.ops.bias_act import triton_kernels as bias_act
from fastgan.ops.minibatch_discrimination import triton_kernels as discrimination
from fastgan.ops.minibatch_stddev import layout as stddev_layout
from fastgan.ops.minibatch_stddev import triton_kernels as stddev
from fastgan.ops.norm import layout as norm_layout
from fastgan.ops.norm import triton_kernels as norm


class Launch(NamedTuple):
    case: str
    number: int  # of this kernel's launches in the case
    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: Any
    signature: dict[str, str]
    constants: dict[Any, Any]
    attributes: dict[Any, Any]

    @property
    def name(self) -> str:
        return f"{self.kernel.__module__.split('.')[-2]}.{self.kernel.__name__}"

    @property
    def key(self) -> tuple[Any, ...]:
        return self.name, self.grid, str((self.signature, self.constants, self.attributes))


@contextmanager
def recorder(target: GPUTarget, launches: list[Launch], case: list[str]) -> Iterator[None]:
    """Append launches to ``launches`` under the name in ``case[0]`` instead of executing them."""

    def record(self: Any, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> None:
        backend = CUDABackend(target)
        bind = create_function_from_signature(self.signature, self.params, backend)
        bound, special, options = bind(*args, **kwargs)
        number = sum(launch.case == case[0] and launch.kernel is self for launch in launches)
        rest = self._pack_args(backend, kwargs, bound, special, options)
        launches.append(Launch(case[0], number, self, grid, bound, *rest))

    original = JITFunction.run
    JITFunction.run = record
    try:
        yield
    finally:
        JITFunction.run = original


def record_all(target: GPUTarget) -> list[Launch]:
    """Return each distinct launch of every case once."""
    launches: list[Launch] = []
    case = [""]
    with recorder(target, launches, case):
        for tag, dtype in (("f32", torch.float32), ("f16", torch.float16)):
            for name, launch in [*_norms(dtype), *_activations(dtype), *_deviations(dtype), *_similarities(dtype)]:
                case[0] = f"{name} {tag}"
                launch()
    return list({launch.key: launch for launch in reversed(launches)}.values())[::-1]


Cases = Iterator[tuple[str, Callable[[], None]]]


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype)


def _norms(dtype: torch.dtype) -> Cases:
    x = _empty(64, 256, 32, 32, dtype=dtype)
    last = x.view(64, 32, 32, 256)
    long, wide = _empty(4096, 2**13, dtype=dtype), _empty(64, 2**18, dtype=dtype)
    small = _empty(256, 512, 4, 4, dtype=dtype)
    of = norm_layout.Layout
    for name, x_, layout, weights in (
        ("BN", x, norm_layout.of_batch(x), 256),
        ("BN 4x4", small, norm_layout.of_batch(small), 512),
        ("BN-cl", last, of(1, 1, 256, 2**16, 256, True), 256),
        ("IN", x, norm_layout.of_channels(x, 256), 0),
        ("GN32", x, norm_layout.of_channels(x, 32), 256),
        ("GN32-cl", last, of(64, 1, 256, 1024, 32, True), 256),
        ("LN 4096x8K", long, of(4096, 1, 2**13, 1, 1), 2**13),
        ("LN 64x256K", wide, of(64, 1, 2**18, 1, 1), 2**18),
    ):
        statistics = _empty(3 if "BN" in name else 2, layout.rows)
        w, b = (_empty(weights), _empty(weights)) if weights else (None, None)

        def launch(x=x_, layout=layout, s=statistics, w=w, b=b) -> None:  # type: ignore[no-untyped-def]
            norm.forward(norm_layout.Forward(x, w, b, x, s), layout, 1e-5)
            norm.backward(norm_layout.Backward(x, x, s, w, x, w, b), layout)
            norm.double_backward(norm_layout.DoubleBackward(x, w, b, x, x, s, w, x, x, w), layout)

        yield name, launch


def _activations(dtype: torch.dtype) -> Cases:
    leaky, gelu = (bias_act_layout.Options("leaky_relu", 0.2, 2**0.5), bias_act_layout.Options("gelu"))
    for form, *sizes in (("nchw", 64, 256, 1024), ("cl", 2**16, 256, 1), ("no bias", 1, 1, 2**24)):
        layout = bias_act_layout.Layout(*sizes)
        x = _empty(layout.size, dtype=dtype)
        bits = _empty(bias_act_layout.bytes_of_bits(layout.size), dtype=torch.uint8)
        b, sums = (None, None) if form == "no bias" else (_empty(256), _empty(256))

        def piecewise(x=x, b=b, bits=bits, sums=sums, layout=layout) -> None:  # type: ignore[no-untyped-def]
            bias_act.piecewise_forward(x, b, x, bits, None, layout, leaky)
            bias_act.piecewise_apply(x, None, bits, None, x, sums, layout, leaky)

        def smooth(x=x, b=b, sums=sums, layout=layout) -> None:  # type: ignore[no-untyped-def]
            bias_act.smooth_forward(x, b, x, layout, gelu)
            bias_act.smooth_backward(x, x, b, x, sums, layout, gelu)
            bias_act.smooth_double_backward(x, sums, x, x, b, x, x, sums, layout, gelu)

        yield f"lrelu {form}", piecewise
        yield f"gelu {form}", smooth


def _deviations(dtype: torch.dtype) -> Cases:
    for form, memory in (("nchw", torch.contiguous_format), ("cl", torch.channels_last)):
        x = _empty(32, 512, 16, 16, dtype=dtype).to(memory_format=memory)
        y, slopes = _empty(32, 513, 16, 16, dtype=dtype), _empty(8)
        layout = stddev_layout.layout_of(x, 4, 1)

        def launch(x=x, y=y, slopes=slopes, layout=layout) -> None:  # type: ignore[no-untyped-def]
            stddev.forward(x, y, layout, 1e-8)
            stddev.backward(y, x, x, slopes, layout, 1e-8)
            stddev.double_backward(x, x, slopes, y, x, layout, 1e-8)

        yield f"stddev {form}", launch


def _similarities(dtype: torch.dtype) -> Cases:
    for n in (256, 4096) if dtype == torch.float32 else ():
        m, h, w = _empty(100, 16, n), _empty(n, 100), _empty(n, 100, 16)

        def launch(m=m, h=h, w=w) -> None:  # type: ignore[no-untyped-def]
            discrimination.forward(m, None, h, 0, True)
            discrimination.backward(h, m, None, w, 0)
            discrimination.double_backward(w, h, m, None, h, w, 0)

        yield f"MBD N{n}", launch
