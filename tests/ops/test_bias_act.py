from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F

import fastgan
from fastgan import ops
from fastgan.ops.bias_act import native_kernels
from fastgan.ops.bias_act.layout import ACTIVATIONS, PIECEWISE
from tests.harness import BACKENDS, DTYPES, HAS_GPU, assert_close, backend_name, device_of
from tests.hypothesis_if_there import given, settings, st

# (shape, dimension of the bias or None): odd, prime, 1; above a line of the CPU kernels (1024) and a block of the
# Triton kernels and below them; words of bits that end within a row; few long channels, many short ones.
SHAPES = {
    "images": ((3, 5, 7, 3), 1),
    "no bias": ((2, 1031), None),
    "vectors": ((67, 33), 1),
    "one": ((1, 1), 1),
    "last": ((2, 3, 31), -1),
    "first": ((5, 13), 0),
    "long channels": ((2, 3, 1500), 1),
    "many channels": ((3, 1100), 1),
}
FEW = ("images", "no bias")
CUTS = {"plain": {}, "scaled and cut off": dict(gain=1.5, clamp=0.7)}


@dataclass
class Problem:
    """Operands drawn in float64 and rounded to a dtype, so that every dtype sees one problem."""

    x: Tensor
    bias: Tensor | None
    scale: Tensor
    options: dict[str, object]

    def to(self, dtype: torch.dtype) -> Problem:
        parts = (None if t is None else t.detach().to(dtype).clone().requires_grad_() for t in self.leaves(None))
        return Problem(*parts, self.options)

    def leaves(self, *without: object) -> list[Tensor]:
        """x, bias (if there is one) and scale; with an argument, all three."""
        parts = [self.x, self.bias, self.scale]
        return parts if without else [t for t in parts if t is not None]

    def __call__(self, backend: str, x: Tensor | None = None) -> Tensor:
        if backend == "pytorch":
            return in_pytorch(self.x, self.bias, **self.options)
        return ops.bias_act(self.x if x is None else x, self.bias, **self.options, backend=backend)


def in_pytorch(x, bias, activation, dim, negative_slope, gain=1.0, clamp=None):
    """PyTorch's operations in the dtype of x. fastgan's reference computes in float32."""
    x = x if bias is None else x + bias.view([-1 if d == dim % x.ndim else 1 for d in range(x.ndim)])
    named = {"leaky_relu": {"negative_slope": negative_slope}, "gelu_tanh": {"approximate": "tanh"}}
    y = (
        x
        if activation == "linear"
        else getattr(F, activation[:4] if "gelu" in activation else activation)(x, **named.get(activation, {}))
    )
    return y * gain if clamp is None else (y * gain).clamp(-clamp, clamp)


def problem_of(activation, shape="images", cut="plain", dtype=torch.float64, device="cpu"):
    sizes, dim = SHAPES[shape] if isinstance(shape, str) else shape
    draw = lambda *size: torch.randn(size, dtype=torch.float64).to(device, dtype)  # noqa: E731
    options = dict(activation=activation, dim=1 if dim is None else dim, negative_slope=0.2, **CUTS[cut])
    return Problem(draw(*sizes), None if dim is None else draw(sizes[dim]), draw(*sizes), options)


def table(every_dtype=True):
    """backend x activation x shape x cut x dtype; through Triton's interpreter, which is slow, not every product."""
    for backend in BACKENDS[:3]:
        name = backend_name(backend)
        interpreted = name == "triton" and not HAS_GPU
        for dtype, shape, cut, activation in product(DTYPES if every_dtype else DTYPES[:2], SHAPES, CUTS, ACTIVATIONS):
            both = shape in FEW and cut == "scaled and cut off"
            if shape not in FEW and (dtype != torch.float32 or activation not in ("relu", "silu")):
                continue
            if interpreted and not (both if dtype == torch.float32 else activation in ("relu", "gelu") and both):
                continue
            marks = backend.marks if hasattr(backend, "marks") else ()
            label = f"{name}-{str(dtype)[6:]}-{activation}-{shape}-{cut}"
            yield pytest.param(name, dtype, activation, shape, cut, marks=marks, id=label)


def values_and_gradients(problem: Problem, backend: str) -> list[tuple[int, Tensor]]:
    """(order of derivative, result)."""
    y = problem(backend)
    by = [t for t in (problem.x, problem.bias) if t is not None]
    return [(0, y), *((1, g) for g in torch.autograd.grad(y, by, problem.scale.detach()))]


def penalty_gradients(problem: Problem, backend: str) -> list[tuple[int, Tensor]]:
    """Through a penalty on the gradient of x, as for a critic, and one on the gradients of x and the bias."""
    score = (torch.tanh(problem(backend)) * problem.scale).sum()
    by = [t for t in (problem.x, problem.bias) if t is not None]
    grads = torch.autograd.grad(score, by, create_graph=True)
    results = list(torch.autograd.grad(grads[0].square().mean(), problem.leaves(), retain_graph=True))
    results += torch.autograd.grad(sum(g.square().mean() for g in grads), problem.leaves())
    return [(2, result) for result in results]


def compare(compute, problem, backend, dtype):
    exact = compute(problem.to(torch.float64), "reference")
    own = compute(problem.to(dtype), "pytorch")
    actual = compute(problem.to(dtype), backend)
    for (order, a), (_, e), (_, o) in zip(actual, exact, own, strict=True):
        assert a.dtype == dtype
        assert_close(a, e.to(a.device), order=order, reference=o)


@pytest.mark.parametrize(("backend", "dtype", "activation", "shape", "cut"), list(table()))
def test_values_and_gradients_equal_pytorch_in_float64(backend, dtype, activation, shape, cut):
    compare(values_and_gradients, problem_of(activation, shape, cut, dtype, device_of(backend)), backend, dtype)


@pytest.mark.parametrize(("backend", "dtype", "activation", "shape", "cut"), list(table(every_dtype=False)))
def test_second_order_through_a_penalty_equals_pytorch(backend, dtype, activation, shape, cut):
    compare(penalty_gradients, problem_of(activation, shape, cut, dtype, device_of(backend)), backend, dtype)


@pytest.mark.parametrize("activation", ["leaky_relu", "silu", "tanh"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS[1:3])
def test_second_order_in_half_precision_errs_at_most_twice_as_much_as_pytorch(backend, dtype, activation):
    compare(penalty_gradients, problem_of(activation, dtype=dtype, device=device_of(backend)), backend, dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS[2:3])
def test_gelu_in_half_precision_is_rounded_from_a_value_that_is_nearly_exact(backend, dtype):
    """Also in the tail, where 1 + erf would cancel. Triton has its own formula for these types."""
    u = torch.linspace(-12, 8, 4001).to(dtype)
    exact = u.double() * torch.erfc(u.double() / -(2**0.5)) / 2
    y = ops.bias_act(u.to(device_of(backend)), activation="gelu", backend=backend).cpu()
    unit = torch.finfo(dtype).eps * exact.abs().clamp_min(torch.finfo(dtype).tiny)
    assert ((y.double() - exact).abs() / unit).max() < 0.53  # 0.5 is rounding


@pytest.mark.parametrize("inner", [1, 8])
@pytest.mark.parametrize("backend", BACKENDS[2:3])
def test_eight_elements_of_one_channel_and_of_eight_channels_have_their_bias(backend, inner):
    """The Triton kernel finds the channels of eight elements by one division."""
    x, bias = torch.randn(3, 24, inner, device=device_of(backend)), torch.randn(24, device=device_of(backend))
    actual = ops.bias_act(x, bias, dim=1, activation="linear", backend=backend)
    torch.testing.assert_close(actual, x + bias[:, None])


@pytest.mark.parametrize(("kernel", "results"), [("piecewise_apply", (4, 5)), ("smooth_double_backward", (5, 6, 7))])
def test_a_broken_derivative_would_be_seen_by_the_penalty(kernel, results, monkeypatch):
    whole = getattr(native_kernels, kernel)
    problem = problem_of("leaky_relu" if kernel == "piecewise_apply" else "silu", dtype=torch.float32)
    compare(penalty_gradients, problem, "cpu", torch.float32)
    for broken in results:

        def wrong(*arguments, broken=broken):
            whole(*arguments)
            if arguments[broken] is not None:
                arguments[broken].mul_(1.01)

        monkeypatch.setattr(native_kernels, kernel, wrong)
        with pytest.raises(AssertionError, match="relative error"):
            compare(penalty_gradients, problem, "cpu", torch.float32)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("backend", BACKENDS[:3])
def test_gradcheck_and_gradgradcheck_hold(backend, activation):
    problem = problem_of(activation, ((2, 3, 2), 1), "scaled and cut off", device=device_of(backend)).to(torch.float64)

    def activated(x, bias):
        return ops.bias_act(x, bias, **problem.options, backend=backend)

    fast = backend == "triton"  # its interpreter is slow: random projections instead of every element
    assert gradcheck(activated, (problem.x, problem.bias), fast_mode=fast)
    assert gradgradcheck(activated, (problem.x, problem.bias), fast_mode=fast)


@pytest.mark.parametrize("activation", ["tanh", "sigmoid"])
@pytest.mark.parametrize("backend", BACKENDS[1:3])
def test_what_keeps_its_result_is_differentiated_twice_too(backend, activation):
    problem = problem_of(activation, ((2, 3, 2), 1), device=device_of(backend)).to(torch.float64)
    activated = lambda x, bias: ops.bias_act(x, bias, activation=activation, backend=backend)  # noqa: E731
    assert gradcheck(activated, (problem.x, problem.bias), fast_mode=True)
    assert gradgradcheck(activated, (problem.x, problem.bias), fast_mode=True)


def orders(y, x, count):
    results = [y]
    for _ in range(count):
        results += torch.autograd.grad(results[-1].pow(3).sum(), x, create_graph=True)
    return results


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("activation", PIECEWISE)
@pytest.mark.parametrize("backend", BACKENDS[1:3])
def test_what_is_linear_in_pieces_has_every_derivative(backend, activation, cut):
    problem = problem_of(activation, ((3, 4), 1), cut, device=device_of(backend)).to(torch.float64)
    actual, expected = (orders(problem(name), problem.x, 4) for name in (backend, "reference"))
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, order=0)


def saved_bytes(function):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        y = function()
    shared = y.untyped_storage().data_ptr()
    return sum(t.nbytes for t in saved if t.untyped_storage().data_ptr() != shared)


def test_what_is_linear_in_pieces_keeps_one_bit_an_element_and_two_if_it_is_cut_off():
    x = torch.randn(4, 8, 4096, requires_grad=True)  # smaller inputs have no bits
    bits = x.numel() // 8
    assert saved_bytes(lambda: ops.relu(x)) == bits
    assert saved_bytes(lambda: ops.bias_act(x)) == bits
    assert saved_bytes(lambda: ops.bias_act(x, clamp=1.0)) == 2 * bits
    assert saved_bytes(lambda: ops.bias_act(x, activation="linear", gain=2.0)) == 0
    assert saved_bytes(lambda: ops.bias_act(x, activation="tanh")) == 0
    assert saved_bytes(lambda: ops.bias_act(x, activation="silu")) == x.nbytes


def test_without_gradients_nothing_is_kept(monkeypatch):
    kernel, bits = native_kernels.piecewise_forward, []
    monkeypatch.setattr(native_kernels, "piecewise_forward", lambda *a: (bits.append(a[3]), kernel(*a)))
    x = torch.randn(5, 7, requires_grad=True)
    with torch.no_grad():
        plain = ops.bias_act(x)
    assert not plain.requires_grad
    assert torch.equal(plain, ops.bias_act(x))
    assert [b is None for b in bits] == [True, False]


def recorded(monkeypatch, name, results):
    """Record the results that each call of a native kernel computes: True if one was requested."""
    kernel, calls = getattr(native_kernels, name), []

    def spy(*arguments):
        calls.append(tuple(t is not None for t in arguments[results]))
        kernel(*arguments)

    monkeypatch.setattr(native_kernels, name, spy)
    return calls


KERNELS = {"leaky_relu": ("piecewise_apply", slice(4, 6)), "silu": ("smooth_backward", slice(3, 5))}


@pytest.mark.parametrize("activation", KERNELS)
def test_only_the_gradients_that_are_asked_for_are_made(activation, monkeypatch):
    calls = recorded(monkeypatch, *KERNELS[activation])
    for wanted in [(True, False), (False, True), (True, True)]:
        problem = problem_of(activation, dtype=torch.float32).to(torch.float32)
        for leaf, wants in zip((problem.x, problem.bias), wanted, strict=True):
            leaf.requires_grad_(wants)
        problem("cpu").square().sum().backward()
        assert calls.pop() == wanted
        assert (problem.x.grad is not None, problem.bias.grad is not None) == wanted


@pytest.mark.parametrize("activation", KERNELS)
def test_a_gradient_of_the_input_alone_leaves_the_bias_out(activation, monkeypatch):
    calls = recorded(monkeypatch, *KERNELS[activation])
    problem = problem_of(activation, dtype=torch.float32).to(torch.float32)
    results = []
    for backend in ("cpu", "reference"):
        loss = (problem(backend) * problem.scale).sum()
        (grad,) = torch.autograd.grad(loss, problem.x, create_graph=True)
        results.append(torch.autograd.grad(grad.square().sum(), problem.leaves(), allow_unused=True))
    assert calls[0] == (True, False)
    for actual, expected in zip(*results, strict=True):
        assert (actual is None) == (expected is None or not expected.any())
        if actual is not None:
            assert_close(actual, expected.double(), order=2)


def test_nothing_flows_through_the_slopes_where_pytorch_sends_zeros():
    problem = problem_of("leaky_relu", cut="scaled and cut off").to(torch.float64)
    leaves = problem.x, problem.bias, problem.scale
    for result in torch.autograd.grad(problem("cpu"), leaves[:2], problem.scale, create_graph=True):
        grads = torch.autograd.grad(result.sin().sum(), leaves, allow_unused=True, retain_graph=True)
        assert tuple(g is not None for g in grads) == (False, False, True)


@pytest.mark.parametrize("backend", BACKENDS[1:3])
def test_opcheck_accepts_the_operators(backend, monkeypatch):
    monkeypatch.undo()  # opcheck compares allocations of its own
    x, dy = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    x, dy, bias = x.to(device_of(backend)), dy.to(device_of(backend)), torch.randn(3, device=device_of(backend))
    bits = [torch.zeros(16, dtype=torch.uint8, device=x.device) for _ in range(2)]
    out, sums = torch.zeros_like(x), torch.zeros_like(bias)
    rest = [2, 3, 20], "relu", 0.0, 1.5, 0.75, backend
    smooth = [2, 3, 20], "gelu", 0.0, 1.5, 0.75, backend
    for name, arguments in {
        "piecewise_forward": (x, bias, out, *bits, *rest),
        "piecewise_apply": (dy, bias, *bits, out, sums, *rest),
        "smooth_forward": (x, bias, out, *smooth),
        "smooth_backward": (dy, x, bias, out, None, *smooth),
        "smooth_double_backward": (dy, bias, dy, x, bias, out, None, sums, *smooth),
    }.items():
        torch.library.opcheck(getattr(torch.ops.fastgan, f"bias_act_{name}"), arguments)


@pytest.mark.parametrize("activation", ["leaky_relu", "gelu"])
@pytest.mark.parametrize("backend", BACKENDS[1:3])
def test_strides_are_kept_and_do_not_matter(backend, activation):
    problem = problem_of(activation, ((2, 3, 5, 4), 1), dtype=torch.float32, device=device_of(backend)).to(
        torch.float32
    )
    forms = {
        "contiguous": problem.x,
        "channels_last": problem.x.contiguous(memory_format=torch.channels_last),
        "transposed": problem.x.mT.contiguous().mT,
        "sliced": torch.cat([problem.x, problem.x], 1)[:, :3],
        "flipped": problem.x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
    }
    results = {}
    for name, x in forms.items():
        x = x.detach().requires_grad_()
        y = problem(backend, x)
        assert y.stride() == F.silu(x).stride()
        grads = torch.autograd.grad(y, (x, problem.bias), problem.scale.mT.contiguous().mT, create_graph=True)
        assert grads[0].stride() == y.stride()
        penalty = sum(g.square().sum() for g in grads)
        results[name] = [y, *grads, *torch.autograd.grad(penalty, (problem.scale, problem.bias), allow_unused=True)]
    for name, result in results.items():
        for a, b in zip(result, results["contiguous"], strict=True):
            if a is not None:
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("form", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("backend", BACKENDS[:2])
def test_in_place_it_writes_over_its_input_and_keeps_the_derivatives(backend, activation, form):
    problem = problem_of(activation, ((2, 3, 5, 4), 1)).to(torch.float64)
    results = []
    for inplace in (True, False):
        x = torch.cat([problem.x, problem.x], 1)[:, :3] if form == "sliced" else problem.x * 1
        if form == "channels_last":
            x = x.contiguous(memory_format=torch.channels_last)
        address = x.data_ptr()
        y = ops.bias_act(x, problem.bias, activation=activation, inplace=inplace, backend=backend)
        assert (y.data_ptr() == address) == inplace
        if inplace:
            assert torch.equal(x, y)
        grads = torch.autograd.grad(y.sin().sum(), (problem.x, problem.bias), create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in grads), (problem.x, problem.bias))
        results.append([y, *grads, *second])
    for a, e in zip(*results, strict=True):
        assert_close(a, e, order=0)
    with torch.no_grad():
        x = problem.x.clone()
        assert ops.bias_act(x, problem.bias, activation=activation, inplace=True, backend=backend) is x
        assert_close(x, results[1][0], order=0)


def test_a_leaf_is_not_written_over():
    x = torch.randn(4, 4, requires_grad=True)
    for activation in ("relu", "tanh", "gelu"):
        with pytest.raises(RuntimeError, match="leaf"):
            ops.bias_act(x, activation=activation, inplace=True)


@pytest.mark.parametrize("function", ["relu", "leaky_relu"])
@pytest.mark.parametrize("input", [[1.0], {"x": 1.0}, None], ids=repr)
def test_an_input_that_is_no_tensor_raises_pytorchs_error(function, input):
    with pytest.raises(TypeError, match=rf"input.* must be Tensor, not {type(input).__name__}"):
        getattr(ops, function)(input)


@pytest.mark.parametrize("activation", ["leaky_relu", "gelu"])
@pytest.mark.parametrize("backend", BACKENDS[:3])
def test_the_same_inputs_give_the_same_bits(backend, activation):
    problem = problem_of(activation, dtype=torch.float32, device=device_of(backend))
    first, second = (penalty_gradients(problem.to(torch.float32), backend) for _ in range(2))
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(first, second, strict=True))


@pytest.mark.parametrize("activation", ["leaky_relu", "silu"])
@pytest.mark.parametrize("shape", [((9, 12, 31, 29), 1), ((700, 67), 1), ((2, 40001), 1)], ids=str)
def test_the_cpu_kernels_give_the_same_bits_on_any_number_of_threads(activation, shape):
    problem = problem_of(activation, shape, dtype=torch.float32)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            mine = problem.to(torch.float32)
            results.append([r for f in (values_and_gradients, penalty_gradients) for _, r in f(mine, "cpu")][:3])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set_computes_the_same(isa, monkeypatch):
    native = fastgan.backends.native()
    available = ["baseline", "avx2", "avx512"]
    if available.index(isa) > available.index(native.isa()):
        pytest.skip(f"this processor's best instruction set is {native.isa()}")
    used = set()

    class Forced:
        def __getattr__(self, name):
            used.add(name)
            return lambda *arguments: getattr(native, name)(*arguments, isa=isa)

    monkeypatch.setattr(fastgan.backends, "native", Forced)
    for dtype, activation in [*product(DTYPES[:2], ACTIVATIONS), *product(DTYPES[2:], ("leaky_relu", "gelu"))]:
        for compute in (values_and_gradients, penalty_gradients):
            compare(compute, problem_of(activation, dtype=dtype), "cpu", dtype)
    assert used == {f"{kind}_forward" for kind in ("piecewise", "smooth")} | {
        "piecewise_apply",
        "smooth_backward",
        "smooth_double_backward",
    }


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(1, 40), min_size=1, max_size=4).filter(lambda shape: torch.Size(shape).numel() < 50000),
    dim=st.integers(0, 3),
    activation=st.sampled_from(ACTIVATIONS),
    cut=st.sampled_from(list(CUTS)),
)
def test_any_shape_matches_on_the_cpu(shape, dim, activation, cut):
    problem = problem_of(activation, (shape, dim % len(shape)), cut)
    for compute in (values_and_gradients, penalty_gradients):
        pairs = zip(
            compute(problem.to(torch.float64), "cpu"), compute(problem.to(torch.float64), "reference"), strict=True
        )
        for (_, actual), (_, expected) in pairs:
            torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("activation", ["leaky_relu", "silu"])
def test_a_float32_bias_goes_with_an_input_in_half_precision(activation, dtype):
    problem = problem_of(activation, dtype=dtype).to(dtype)
    problem.bias = problem.bias.detach().float().requires_grad_()
    actual, own = (values_and_gradients(problem, backend) for backend in ("cpu", "reference"))
    exact = values_and_gradients(problem.to(torch.float64), "reference")
    assert [a.dtype for _, a in actual] == [a.dtype for _, a in own] == [dtype, dtype, torch.float32]
    for (order, a), (_, e), (_, o) in zip(actual, exact, own, strict=True):
        assert_close(a, e, order=order, reference=o)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_leaves_the_type_of_the_input(dtype):
    problem = problem_of("leaky_relu", dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        assert problem("cpu").dtype == dtype
        assert torch.equal(problem("cpu"), problem.to(dtype)("cpu"))


@pytest.mark.parametrize("backend", BACKENDS[:3])
def test_an_empty_batch_gives_what_pytorch_gives(backend):
    x = torch.randn(0, 4, 5, requires_grad=True, device=device_of(backend))
    bias = torch.randn(4, requires_grad=True, device=device_of(backend))
    y = ops.bias_act(x, bias, backend=backend)
    assert y.shape == x.shape
    grads = torch.autograd.grad(y.sum(), (x, bias))
    assert torch.equal(grads[1], torch.zeros_like(bias))


X, B = torch.randn(3, 4, 5), torch.randn(4)
BAD = {
    "a list": (dict(input=X.tolist()), TypeError, "input must be a tensor, got list"),
    "integers": (dict(input=X.long()), TypeError, "input must be float.* torch.int64"),
    "complex": (dict(input=X.cfloat()), TypeError, "input must be float.* torch.complex64"),
    "activation": (dict(activation="mish"), ValueError, "activation must be one of linear, .*, got 'mish'"),
    "slope": (dict(negative_slope="0.2"), TypeError, "negative_slope must be a number, got str"),
    "gain": (dict(gain=float("nan")), ValueError, "gain must be finite, got nan"),
    "clamp": (dict(clamp=0.0), ValueError, r"clamp must be above 0 or None, got 0\.0"),
    "infinite clamp": (dict(clamp=float("inf")), ValueError, "clamp must be finite, got inf"),
    "dim": (dict(dim=3), ValueError, r"dim must be a dimension of the input with shape \(3, 4, 5\), got 3"),
    "bias a list": (dict(bias=[1.0]), TypeError, "bias must be a tensor or None, got list"),
    "shape of bias": (dict(bias=B[:3]), ValueError, r"bias must have shape \(4,\), the size of dimension 1, got"),
    "dtype of bias": (dict(bias=B.double()), TypeError, "bias must have the input's dtype, torch.float32"),
    "half bias": (dict(bias=B.half()), TypeError, "bias must have the input's dtype"),
    "device of bias": (dict(bias=B.to("meta")), ValueError, "bias must be on the input's device, cpu, got meta"),
    "backend": (dict(backend="fast"), ValueError, "backend must be one of"),
    "no such backend": (dict(backend="cuda"), fastgan.BackendUnavailable, "bias_act: backend 'cuda'"),
}


@pytest.mark.parametrize(("change", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input_raises_a_message_that_names_it(change, error, message):
    with pytest.raises(error, match=message):
        ops.bias_act(**(dict(input=X, bias=B) | change))
