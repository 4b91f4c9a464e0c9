"""Minibatch discrimination on emulated CUDA: run by test_emulated_kernels.py, in the process that has the module."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

from fastgan import backends
from fastgan.ops.minibatch_discrimination import native_kernels, reference
from fastgan.ops.minibatch_discrimination.autograd import packed

MODULE = "FASTGAN_EMULATED_MODULE"
# (N, B, C), first row, rows, segments, exclude_self: tiles of 64 samples against 64 or 32 or 16, 16 dims at a time,
# 32 dims a block.
CASES = {
    "one sample": ((1, 2, 3), 0, 1, 1, True),
    "within a tile": ((13, 3, 5), 0, 13, 1, True),
    "oneself too": ((13, 2, 5), 0, 13, 1, False),
    "above a tile": ((67, 1, 4), 0, 67, 1, True),
    "segments": ((35, 2, 3), 0, 35, 3, True),
    "some rows": ((41, 2, 3), 17, 9, 2, True),
    "more dims than a block has": ((9, 1, 37), 0, 9, 1, True),
}
SOME = ("within a tile", "more dims than a block has")
# The fibers run in ascending order (False) or in descending order.
TABLE = [("float32", case, descending) for descending in (False, True) for case in CASES]
TABLE += [(dtype, case, False) for dtype in ("float64", "float16", "bfloat16") for case in SOME]
TOLERANCES = {"float32": (1e-5, 1e-4, 1e-3, 1e-3), "float64": (1e-12,) * 4}


def error(actual, exact):
    return ((actual.double() - exact).norm() / exact.norm()).item() if exact.norm() > 0 else actual.norm().item()


def expected(m, h, w, segments, exclude_self):
    m, h = m.detach().requires_grad_(), h.detach().requires_grad_()
    o = reference.minibatch_discrimination(m, m, 0, segments, exclude_self)
    (dm,) = torch.autograd.grad(o, m, h, create_graph=True)
    return [t.detach() for t in (o, dm, *torch.autograd.grad(dm, (h, m), w))]


if MODULE in os.environ:

    @pytest.fixture(autouse=True)
    def on_the_emulated_device(monkeypatch):
        spec = importlib.util.spec_from_file_location("_native_cuda", os.environ[MODULE])
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.setattr(backends, "native_cuda", lambda: module)
        monkeypatch.setattr(native_kernels.Native, "_where", lambda self, m: 0)

    @pytest.mark.parametrize(("dtype_name", "case", "descending"), TABLE, ids=str)
    def test_values_and_both_orders_match_float64(dtype_name, case, descending, monkeypatch):
        monkeypatch.setenv("FASTGAN_EMULATION_REVERSED", str(int(descending)))
        dtype, (shape, first, rows, segments, exclude_self) = getattr(torch, dtype_name), CASES[case]
        n, b, c = shape
        m, w = ((torch.randn(shape, dtype=torch.float64) / c).to(dtype) for _ in range(2))
        m[n // 2] = m[0]  # ties
        h = torch.randn(n, b, dtype=torch.float64).to(dtype)
        of = torch.arange(n) % segments if segments > 1 else None
        exact = expected(*(t.double() for t in (m, h, w)), of, exclude_self)
        same = expected(m, h, w, of, exclude_self)

        kernels, everyone = native_kernels.Native("cuda"), packed(m, "cuda")
        o, by_h = (torch.full((rows, b), float("nan"), dtype=dtype) for _ in range(2))
        dm, by_m = (torch.full((rows, b, c), float("nan"), dtype=dtype) for _ in range(2))
        kernels.forward(everyone, of, o, first, exclude_self)
        kernels.backward(h, everyone, of, dm, first)
        kernels.double_backward(w, h, everyone, of, by_h, by_m, first)
        own = slice(first, first + rows)
        for k, (actual, e, s) in enumerate(zip((o, dm, by_h, by_m), exact, same, strict=True)):
            half = dtype_name not in TOLERANCES
            allowed = 2 * max(error(s[own], e[own]), torch.finfo(dtype).eps / 2) if half else TOLERANCES[dtype_name][k]
            assert error(actual, e[own]) <= allowed

    @pytest.mark.parametrize("left_out", ["by_h", "by_m"])
    def test_one_of_the_second_derivatives_can_be_left_out(left_out):
        m, w, h = torch.randn(21, 2, 3), torch.randn(21, 2, 3), torch.randn(21, 2)
        kernels, everyone = native_kernels.Native("cuda"), packed(m, "cuda")
        both = {"by_h": torch.empty_like(h), "by_m": torch.empty_like(m)}
        kernels.double_backward(w, h, everyone, None, *both.values(), 0)
        one = {name: torch.empty_like(t) for name, t in both.items()} | {left_out: None}
        kernels.double_backward(w, h, everyone, None, *one.values(), 0)
        assert all(torch.equal(one[name], both[name]) for name in both if name != left_out)
