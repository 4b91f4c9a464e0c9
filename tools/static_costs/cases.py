"""The launches that are counted: names of cases, and calls of fastgan's launch code on empty tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from fastgan.ops.attention import triton_kernels as attention
from fastgan.ops.attention.layout import Options as AttentionOptions
from fastgan.ops.bias_act import layout as bias_act_layout
from fastgan.ops.bias_act import triton_kernels as bias_act
from fastgan.ops.filtered_lrelu import triton_kernels as filtered_lrelu
from fastgan.ops.library import accumulation_dtype
from fastgan.ops.minibatch_discrimination import triton_kernels as discrimination
from fastgan.ops.minibatch_stddev import layout as stddev_layout
from fastgan.ops.minibatch_stddev import triton_kernels as stddev
from fastgan.ops.norm import layout as norm_layout
from fastgan.ops.norm import triton_kernels as norm
from fastgan.ops.spectral_norm import triton_kernels as spectral_norm
from fastgan.ops.spectral_norm.layout import layout_of
from fastgan.ops.upfirdn2d import triton_kernels as filters

Cases = Iterator[tuple[str, Callable[[], None]]]


def cases(dtype: torch.dtype) -> Cases:
    """Yield the name of each case and the calls that launch its kernels."""
    for of_op in (_norms, _activations, _deviations, _similarities, _filters, _filtered, _spectral_norms, _attention):
        yield from of_op(dtype)


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


def _filters(dtype: torch.dtype) -> Cases:
    taps = (1.0, 3.0, 3.0, 1.0) * 2
    for name, up, down, size in (("up 2", 2, 1, 64), ("down 2", 1, 2, 256), ("blur", 1, 1, 128)):
        for form, planes, inner in (("nchw", 32 * 64, 1), ("cl", 32, 64)):
            x, y = (
                _empty(planes * inner * size**2, dtype=dtype),
                _empty(planes * inner * (size * up // down) ** 2, dtype=dtype),
            )
            sizes = planes, inner, size, size, size * up // down, size * up // down, up, up, down, down, 1, 1, 4, 4

            def launch(x=x, y=y, sizes=sizes) -> None:  # type: ignore[no-untyped-def]
                filters.upfirdn2d(x, y, sizes, True, taps)

            yield f"{name} {form}", launch


def _filtered(dtype: torch.dtype) -> Cases:
    """A layer of StyleGAN3, whose filters have 12 taps, and one with 4."""
    for count in (12, 4):
        taps = tuple(float(i + 1) for i in range(count)) * 2
        x, z = _empty(32 * 64 * 64**2, dtype=dtype).view(32, 64, 64, 64), _empty(32 * 64 * 128**2, dtype=dtype)
        bias = _empty(64, dtype=accumulation_dtype(dtype))
        bits = _empty(filtered_lrelu.size_of_bits(32 * 64, 128, 128), dtype=torch.uint8)
        sizes = 32 * 64, 1, 64, 64, 128, 128, 2, 2, 1, 1, count // 2, count // 2, count, count

        def launch(x=x, bias=bias, z=z, bits=bits, sizes=sizes, taps=taps) -> None:  # type: ignore[no-untyped-def]
            for read in (False, True):
                of_read = None if read else bias, z, bits, read
                filtered_lrelu.activated(x, *of_read, sizes, True, taps, 0.2, 2**0.5, 256.0)

        yield f"filtered {count} taps", launch


def _spectral_norms(dtype: torch.dtype) -> Cases:
    weights = [_empty(1024, 512, 4, 4, dtype=dtype) for _ in range(4)]
    for form, dim in (("rows", 0), ("columns", 1)):  # a convolution's weight, and a transposed one's
        layout = layout_of(weights, [dim] * 4)
        us = [_empty(rows, dtype=dtype) for _, rows, _ in layout.matrices]
        vs = [_empty(outer * inner, dtype=dtype) for outer, _, inner in layout.matrices]

        def launch(layout=layout, us=us, vs=vs) -> None:  # type: ignore[no-untyped-def]
            saved = _empty(layout.total)
            spectral_norm.forward(weights, weights, us, vs, saved, layout, 1, 1e-12, False)
            spectral_norm.backward(weights, weights, weights, saved, layout)

        yield f"SN {form}", launch


def _attention(dtype: torch.dtype) -> Cases:
    for width in (32, 64):
        q, lse = _empty(32, 8, 1024, width, dtype=dtype), _empty(32, 8, 1024)
        options = AttentionOptions(width**-0.5, False, 0.0)

        def launch(q=q, lse=lse, options=options) -> None:  # type: ignore[no-untyped-def]
            attention.forward(q, q, q, None, None, q, lse, options)
            attention.backward(q, q, q, q, None, q, lse, None, q, q, q, None, options)
            given = (q, q, q, None, q, q, q, q, None, q, lse, None)
            attention.double_backward(*given, q, q, q, q, None, options)

        yield f"heads of {width}", launch
