"""The CUDA kernels' values without a GPU: csrc/cuda compiled for the CPU over emulation/, with sanitizers.

UndefinedBehaviorSanitizer is always on. AddressSanitizer takes longer: it runs with FASTGAN_TESTS=all.

The tests cover the logic: indices, barriers, asynchronous copies, waves, slots. They do not cover memory ordering
between blocks and speed.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.nn.functional import normalize

from fastgan import backends
from fastgan.ops.library import accumulation_dtype
from fastgan.ops.spectral_norm import native_kernels, reference
from fastgan.ops.spectral_norm.layout import as_matrix, layout_of, split_saved

ROOT = Path(__file__).parents[2]
MODULE = "FASTGAN_EMULATED_MODULE"  # set in the process that runs the values under the sanitizers
COMPILER = shutil.which("g++")
# (weight's shape, dimension of its rows)
SHAPES = {
    "one tile": [((5, 7), 0), ((1, 1), 0), ((37, 1), 0), ((1, 40), 0), ((16, 3, 3, 3), 0)],
    "vectors": [((64, 32), 0), ((12, 8, 4, 4), 0), ((1, 512), 0)],
    "more tiles than slots": [((64, 160), 0)],
    "odd, more tiles than slots": [((61, 167), 0)],
    "outer": [((16, 8, 4, 4), 1), ((40, 36), 1), ((13, 6, 3, 3), 1), ((2, 3, 70), 1), ((2, 3, 4), 2), ((3, 5, 68), 1)],
    "waves": [((60, 64), 0), ((7, 5), 0), ((64, 50), 1), ((20, 16, 3, 3), 0), ((150, 9), 0), ((48, 64), 0)],
    "more weights than a launch takes": [((3, 5), 0)] * 131,
}
# (power iterations, v first, elements between an allocation's start and the weight)
MODES = [(1, False, 0), (1, True, 0), (0, False, 0), (3, False, 1), (2, True, 1)]
CASES = [("float32", shapes, MODES[0]) for shapes in SHAPES]
CASES += [(dtype, shapes, MODES[0]) for dtype in ("float64", "float16", "bfloat16") for shapes in list(SHAPES)[:-1]]
CASES += [("float32", shapes, mode) for shapes in ("one tile", "outer", "waves") for mode in MODES[1:]]
CASES += [(dtype, "outer", mode) for dtype in ("float64", "float16", "bfloat16") for mode in MODES[-2:]]
EVERY = os.environ.get("FASTGAN_TESTS") == "all"
if not EVERY:
    CASES = CASES[: len(SHAPES)] + CASES[len(SHAPES) :: 3]
# The fibers run in ascending order (False) or in descending order.
ORDERS = [*((case, False) for case in CASES), *((case, True) for case in CASES[: len(SHAPES)])]


def build(directory):
    python = [f"-I{sysconfig.get_paths()['include']}", f"-I{pybind11_include()}"]
    sanitizers = [f"-fsanitize={'address,' if EVERY else ''}undefined", "-fno-sanitize-recover=all"]
    flags = ["-std=c++17", "-Og", "-g1", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    includes = [f"-I{ROOT / 'tests/cuda/emulation'}", f"-I{ROOT / 'csrc'}", *python]
    block = "-DFASTGAN_SPECTRAL_NORM_BLOCK=64, 4096, 64"  # threads, bytes of a tile, columns of a tile
    sources = [*sorted(ROOT.glob("csrc/cuda/*.cu")), ROOT / "csrc/native_cuda.cpp"]

    def compile_one(source):
        target = directory / f"{source.name}.o"
        # For the kernels alone: the bindings are templates of others, and slow to compile so.
        checked = sanitizers if source.suffix == ".cu" else []
        run([COMPILER, *flags, *checked, *includes, block, "-x", "c++", "-c", str(source), "-o", str(target)])
        return str(target)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sources))
    module = directory / "_native_cuda.so"
    run([COMPILER, "-shared", *sanitizers, *objects, "-o", str(module)])
    return module


def pybind11_include():
    return pytest.importorskip("pybind11", reason="pybind11 is not installed").get_include()


def run(command, **kwargs):
    result = subprocess.run(command, capture_output=True, text=True, **kwargs)
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout[-6000:]}\n{result.stderr[-6000:]}"
    return result


if MODULE not in os.environ:

    @pytest.mark.skipif(COMPILER is None or sys.platform != "linux", reason="needs g++ on Linux")
    def test_kernels_match_the_reference_under_sanitizers(tmp_path):
        module = build(tmp_path)
        environment = os.environ | {MODULE: str(module), "UBSAN_OPTIONS": "print_stacktrace=1"}
        if EVERY:
            # libstdc++ too: the sanitizer looks for the throwing of exceptions when the process starts.
            libraries = [
                run([COMPILER, f"-print-file-name={name}"]).stdout.strip() for name in ("libasan.so", "libstdc++.so")
            ]
            environment |= {"LD_PRELOAD": ":".join(libraries), "PYTHONMALLOC": "malloc"}
            environment |= {"ASAN_OPTIONS": "detect_leaks=0"}
        files = [__file__, str(Path(__file__).with_name("test_emulated_minibatch_discrimination.py"))]
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
        result = run(command, env=environment, cwd=ROOT)
        assert " passed" in result.stdout, result.stdout

else:

    @pytest.fixture(scope="module")
    def emulated():
        spec = importlib.util.spec_from_file_location("_native_cuda", os.environ[MODULE])
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    @pytest.fixture(autouse=True)
    def on_the_emulated_device(emulated, monkeypatch):
        monkeypatch.setattr(backends, "native_cuda", lambda: emulated)
        monkeypatch.setattr(native_kernels.Native, "_where", lambda self, weight: 0)

    def random(shape, dtype, offset):
        """Normal values, ``offset`` elements away from an allocation's alignment."""
        values = torch.empty(torch.Size(shape).numel() + offset, dtype=dtype)[offset:].view(shape)
        return values.copy_(torch.randn(shape, dtype=torch.float64))

    def nothing_like(tensor, offset):
        return random(tensor.shape, tensor.dtype, offset).fill_(float("nan"))

    def error(results, exact):
        """Return the largest error of the list, relative to the norm."""
        return max(((r.double() - e).norm() / e.norm()).item() for r, e in zip(results, exact, strict=True))

    @pytest.mark.parametrize(("case", "descending"), ORDERS, ids=str)
    def test_values_and_gradients_match_float64(case, descending, monkeypatch):
        monkeypatch.setenv("FASTGAN_EMULATION_REVERSED", str(int(descending)))
        assert_values_and_gradients_match_float64(*case)

    def assert_values_and_gradients_match_float64(dtype_name, shapes_name, mode):
        dtype, shapes, (iterations, v_first, offset) = getattr(torch, dtype_name), SHAPES[shapes_name], mode
        dims = [dim for _, dim in shapes]
        weights = [random(shape, dtype, offset) for shape, _ in shapes]
        matrices = [as_matrix(w, dim) for w, dim in zip(weights, dims, strict=True)]
        us, vs = ([normalize(torch.randn(m.shape[i]).double(), dim=0).to(dtype) for m in matrices] for i in (0, 1))
        stored = [x.clone() for x in us + vs]
        exact_weights = [w.to(torch.float64, copy=True).requires_grad_() for w in weights]
        exact_us, exact_vs = ([x.to(torch.float64, copy=True) for x in xs] for xs in (us, vs))
        exact = reference.spectral_norm(exact_weights, exact_us, exact_vs, dims, iterations, 1e-12, v_first)
        same_us, same_vs = ([x.clone() for x in xs] for xs in (us, vs))
        same_weights = [w.clone().requires_grad_() for w in weights]
        same = reference.spectral_norm(same_weights, same_us, same_vs, dims, iterations, 1e-12, v_first)

        layout = layout_of(weights, dims)
        outputs = [nothing_like(w, offset) for w in weights]
        saved = torch.full((layout.total,), float("nan"), dtype=accumulation_dtype(dtype))
        native_kernels.Native("cuda").forward(weights, outputs, us, vs, saved, layout, iterations, 1e-12, v_first)
        if iterations == 0:
            assert all(torch.equal(x, y) for x, y in zip(us + vs, stored, strict=True))
        for i, matrix in enumerate(layout.matrices):
            sigma, u, v = split_saved(saved, layout.offsets[i], matrix)
            assert torch.equal(u.to(dtype), us[i])
            assert torch.equal(v.to(dtype), vs[i])
            assert error([outputs[i].double() * sigma], [weights[i].double()]) <= 4 * torch.finfo(dtype).eps

        grads = [random(shape, dtype, offset) for shape, _ in shapes]
        grad_weights = [nothing_like(w, offset) for w in weights]
        native_kernels.Native("cuda").backward(grads, weights, grad_weights, saved, layout)
        exact_grads = torch.autograd.grad(exact, exact_weights, [g.double() for g in grads])
        same_grads = torch.autograd.grad(same, same_weights, grads)

        exact = [e.detach() for e in exact]
        # A gradient of one that is exactly zero, of a single weight, has no relative error.
        many = [i for i, w in enumerate(weights) if w.numel() > 1]
        pairs = [
            (outputs, same, exact, 1e-5),
            (us + vs, same_us + same_vs, exact_us + exact_vs, 1e-5),
            (*([grads[i] for i in many] for grads in (grad_weights, same_grads, exact_grads)), 1e-4),
        ]
        for results, references, truth, tolerance in pairs:
            if dtype in (torch.float16, torch.bfloat16):
                tolerance = 2 * error(references, truth)
            elif dtype == torch.float64:
                tolerance = 1e-12
            assert error(results, truth) <= tolerance

    @pytest.mark.parametrize("dtype", ["float32", "float64"] if EVERY else ["float32"])
    def test_a_grid_has_the_shared_memory_that_the_device_has_left(dtype, monkeypatch):
        """16 KB are a block's limit; of these 12 KB are free, so that a block holds two tiles instead of three."""
        monkeypatch.setenv("FASTGAN_EMULATION_SHARED_BYTES", str(12 << 10))
        assert_values_and_gradients_match_float64(dtype, "more tiles than slots", MODES[0])

    def test_a_device_without_room_for_two_tiles_is_refused(monkeypatch):
        monkeypatch.setenv("FASTGAN_EMULATION_SHARED_BYTES", str(8 << 10))
        with pytest.raises(RuntimeError, match="no room for a block"):
            assert_values_and_gradients_match_float64("float32", "one tile", MODES[0])

    def test_the_same_inputs_give_the_same_bits():
        weight = torch.randn(97, 301)
        results = []
        for _ in range(2):
            u, v = torch.full((97,), 97**-0.5), torch.full((301,), 301**-0.5)
            output, saved = torch.empty_like(weight), torch.empty(1 + 97 + 301)
            layout = layout_of([weight], [0])
            native_kernels.Native("cuda").forward([weight], [output], [u], [v], saved, layout, 1, 1e-12, False)
            results.append((output, saved))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))

    def test_an_unknown_dtype_is_refused(emulated):
        with pytest.raises(ValueError, match="unknown dtype int8"):
            emulated.spectral_norm_forward("int8", [], 1, 1e-12, False, 0)

    def test_memory_that_is_not_on_a_device_is_refused(emulated):
        with pytest.raises(RuntimeError, match="not on a CUDA device"):
            emulated.spectral_norm_forward("float32", [(0, 0, 0, 0, 0, 0, 1, 1, 1)], 1, 1e-12, False, 0)
