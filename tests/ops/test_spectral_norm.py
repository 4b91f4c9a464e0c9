from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.functional import normalize

import fastgan
from fastgan import ops
from fastgan.ops.spectral_norm import native_kernels, reference
from fastgan.ops.spectral_norm.layout import layout_of
from tests.harness import BACKENDS, DTYPES, HAS_GPU, assert_close, backend_name, device_of
from tests.hypothesis_if_there import given, settings, st

# (shape, dim): one row, one column, odd, prime, transposed convolutions, above a block of every kernel and below it.
LISTS = {
    "one weight": [((5, 7), 0)],
    "thin": [((1, 300), 0), ((300, 1), 0), ((1, 1), 0), ((257, 2), 0)],
    "discriminator": [((32, 3, 4, 4), 0), ((64, 32, 3, 3), 0), ((1, 1024), 0)],
    "transposed": [((13, 5, 4, 4), 1), ((8, 9), 1), ((6, 4, 3), 1), ((3, 2, 2, 3, 2), 1), ((4, 3, 5), 2)],
    "transposed, above a block": [((70, 130, 4, 4), 1)],
    "large": [((257, 131, 3, 3), 0), ((131, 67, 4, 4), 1)],
}
ORDERS = [False, True]


def table():
    """backend x dtype x list x iterations x order; through Triton's interpreter, which is slow, not every product."""
    for backend in BACKENDS:
        interpreted = backend_name(backend) == "triton" and not HAS_GPU
        for dtype, (name, shapes), n, v_first in product(DTYPES, LISTS.items(), (0, 1, 3), ORDERS):
            if "above" in name and backend_name(backend) != "triton":  # "large" is the same to the other backends
                continue
            if interpreted and (name == "large" or (dtype != torch.float32 and (n, v_first) != (1, False))):
                continue
            marks = backend.marks if hasattr(backend, "marks") else ()
            label = f"{backend_name(backend)}-{str(dtype)[6:]}-{name}-{n}-{'v' if v_first else 'u'} first"
            yield pytest.param(backend_name(backend), dtype, shapes, n, v_first, marks=marks, id=label)


def operands(shapes_and_dims, dtype=torch.float32, device="cpu"):
    """weights, us, vs, dims, gradients: drawn in float64 and rounded to dtype, so that every dtype sees one problem."""
    weights, us, vs, dims, grads = [], [], [], [], []
    for shape, dim in shapes_and_dims:
        weight = torch.randn(shape, dtype=torch.float64)
        rows = shape[dim]
        vectors = (normalize(torch.randn(n, dtype=torch.float64), dim=0) for n in (rows, weight.numel() // rows))
        u, v = vectors
        grad = torch.randn(shape, dtype=torch.float64)
        for made, into in ((weight, weights), (u, us), (v, vs), (grad, grads)):
            into.append(made.to(device, dtype))
        dims.append(dim)
    return weights, us, vs, dims, grads


def run(backend, problem, dtype, *, n=1, v_first=False):
    """Return outputs, us, vs and the gradients of the weights after one forward and backward in `dtype`."""
    weights, us, vs, dims, grads = problem
    weights = [w.to(dtype).clone().requires_grad_() for w in weights]
    us, vs, grads = ([t.to(dtype).clone() for t in tensors] for tensors in (us, vs, grads))
    outputs = ops.spectral_norm(
        weights,
        us,
        vs,
        dims=dims,
        n_power_iterations=max(n, 1),
        update=n > 0,
        v_first=v_first,
        backend=backend,
    )
    return outputs, us, vs, list(torch.autograd.grad(outputs, weights, grads))


@pytest.mark.parametrize(("backend", "dtype", "shapes", "n", "v_first"), list(table()))
def test_values_and_gradients_equal_the_float64_reference(backend, dtype, shapes, n, v_first):
    problem = operands(shapes, dtype, device_of(backend))
    exact = run("reference", problem, torch.float64, n=n, v_first=v_first)
    own = run("reference", problem, dtype, n=n, v_first=v_first)
    actual = run(backend, problem, dtype, n=n, v_first=v_first)
    for order, results in zip((0, 0, 0, 1), zip(actual, exact, own, strict=True), strict=True):
        for a, e, o in zip(*results, strict=True):
            assert a.dtype == dtype
            assert_close(a, e, order=order, reference=o)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("v_first", ORDERS, ids=["u first", "v first"])
def test_the_reference_is_what_pytorch_computes(v_first, dim):
    conv = (torch.nn.Conv2d if dim == 0 else torch.nn.ConvTranspose2d)(5, 7, 3).double()
    make = torch.nn.utils.spectral_norm if v_first else torch.nn.utils.parametrizations.spectral_norm
    make(conv)
    if v_first:
        weight, u, v = conv.weight_orig, conv.weight_u.clone(), conv.weight_v.clone()
        conv(torch.randn(1, 5, 8, 8, dtype=torch.float64))
        new_u, new_v = conv.weight_u, conv.weight_v
        expected = conv.weight
    else:
        norm = conv.parametrizations.weight[0]
        weight, u, v = conv.parametrizations.weight.original, norm._u.clone(), norm._v.clone()
        expected = conv.weight
        new_u, new_v = norm._u, norm._v
    (actual,) = reference.spectral_norm([weight], [u], [v], [dim], 1, 1e-12, v_first)
    for a, e in ((actual, expected), (u, new_u), (v, new_v)):
        assert_close(a, e, order=0)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck_and_gradgradcheck_hold(backend, dim):
    (weight,), (u,), (v,), _, _ = operands([((3, 4, 2), dim)], torch.float64, device_of(backend))
    weight.requires_grad_()

    def normalized(w: Tensor) -> Tensor:
        return ops.spectral_norm([w], [u.clone()], [v.clone()], dims=[dim], update=False, backend=backend)[0]

    fast = backend == "triton"  # its interpreter is slow: random projections instead of every element
    assert gradcheck(normalized, weight, fast_mode=fast)
    assert gradgradcheck(normalized, weight, fast_mode=fast)


def penalty_gradients(backend, problem, dtype):
    """Gradients of the weights of a two-layer critic through a gradient penalty and through a penalty on a gradient."""
    weights, us, vs, dims, _ = problem
    weights = [w.to(dtype).requires_grad_() for w in weights]
    us, vs = ([t.to(dtype).clone() for t in tensors] for tensors in (us, vs))
    x = torch.linspace(-1, 1, 4 * weights[0].shape[1], dtype=dtype, device=weights[0].device)
    x = x.reshape(4, -1).requires_grad_()
    first, second = ops.spectral_norm(weights, us, vs, dims=dims, backend=backend)
    score = torch.tanh(x @ first.T) @ second.T  # (4, 1)
    (grad_x,) = torch.autograd.grad(score.sum(), x, create_graph=True)
    through_input = torch.autograd.grad((grad_x.flatten(1).norm(dim=1) - 1).square().mean(), weights, retain_graph=True)
    grad_w = torch.autograd.grad(score.square().sum(), weights, create_graph=True)
    through_weight = torch.autograd.grad(sum(g.square().sum() for g in grad_w), weights)
    return [*through_input, *through_weight]


@pytest.mark.parametrize("backend", BACKENDS)
def test_second_order_through_a_penalty_equals_the_reference(backend):
    problem = operands([((33, 9), 0), ((1, 33), 0)], torch.float32, device_of(backend))
    exact = penalty_gradients("reference", problem, torch.float64)
    for actual, expected in zip(penalty_gradients(backend, problem, torch.float32), exact, strict=True):
        assert_close(actual, expected, order=2)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "reference"])
def test_the_third_order_raises(backend):
    (weight,), us, vs, _, _ = operands([((3, 4), 0)], torch.float64, device_of(backend))
    weight.requires_grad_()
    (out,) = ops.spectral_norm([weight], us, vs, update=False, backend=backend)
    (first,) = torch.autograd.grad(out.pow(3).sum(), weight, create_graph=True)
    (second,) = torch.autograd.grad(first.pow(3).sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="third derivative"):
        torch.autograd.grad(second.sum(), weight)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "reference"])
def test_opcheck_accepts_the_operators(backend, monkeypatch):
    monkeypatch.undo()  # opcheck compares allocations of its own
    weights, us, vs, dims, grads = operands(LISTS["one weight"], torch.float32, device_of(backend))
    layout = layout_of(weights, dims)
    saved, outputs = (
        torch.empty(layout.total, device=weights[0].device),
        [torch.empty_like(w) for w in weights],
    )
    forward = weights, us, vs, outputs, saved, dims, 1, 1e-12, False, backend
    torch.ops.fastgan.spectral_norm_fwd(*forward)
    torch.library.opcheck(torch.ops.fastgan.spectral_norm_fwd, forward)
    backward = grads, weights, saved, outputs, list(layout.offsets), dims, backend
    torch.library.opcheck(torch.ops.fastgan.spectral_norm_bwd, backward)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_are_kept_and_do_not_matter(backend):
    weights, us, vs, _, grads = operands([((16, 8, 3, 3), 0)], torch.float32, device_of(backend))
    forms = {
        "contiguous": weights[0],
        "channels_last": weights[0].contiguous(memory_format=torch.channels_last),
        "transposed": weights[0].permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
        "sliced": torch.cat([weights[0], weights[0]])[:16],
    }
    results = {}
    for name, weight in forms.items():
        weight = weight.detach().requires_grad_()
        (out,) = ops.spectral_norm([weight], [us[0].clone()], [vs[0].clone()], dims=[0], backend=backend)
        assert out.stride() == torch.empty_like(weight).stride()
        (grad,) = torch.autograd.grad(out, weight, grads[0].contiguous(memory_format=torch.channels_last))
        results[name] = out, grad
    for out, grad in results.values():
        assert_close(out, results["contiguous"][0].double(), order=0)
        assert_close(grad, results["contiguous"][1].double(), order=1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_same_inputs_give_the_same_bits(backend):
    device = device_of(backend)
    interpreted = backend == "triton" and device.type == "cpu"
    problem = operands(LISTS["transposed" if interpreted else "large"], torch.float32, device)
    first, second = (run(backend, problem, torch.float32) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_results_that_are_stored_past_the_caches_match(dtype):
    shapes = [((1100, 1001, 2, 2), 0), ((7, 27), 0), ((33, 5, 4, 4), 1)]  # lines that begin anywhere
    problem = operands(shapes, dtype)
    assert sum(weight.nbytes for weight in problem[0]) >= 16 << 20
    exact = run("reference", problem, torch.float64)
    for order, (actual, expected) in enumerate(zip(run("cpu", problem, dtype), exact, strict=True)):
        for a, e in zip(actual, expected, strict=True):
            assert_close(a, e, order=int(order == 3))


def test_the_cpu_kernels_give_the_same_bits_on_any_number_of_threads():
    problem = operands(LISTS["large"], torch.float32)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run("cpu", problem, torch.float32))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set_computes_the_same(isa):

    native = fastgan.backends.native()
    available = ["baseline", "avx2", "avx512"]
    if available.index(isa) > available.index(native.isa()):
        pytest.skip(f"this processor's best instruction set is {native.isa()}")
    for dtype in DTYPES:
        weights, us, vs, dims, _ = problem = operands(LISTS["discriminator"], dtype)
        exact = run("reference", problem, torch.float64)[0]
        own = run("reference", problem, dtype)[0]
        layout = layout_of(weights, dims)
        saved = torch.empty(layout.total, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        outputs = [torch.empty_like(w) for w in weights]
        rows = native_kernels.forward_rows(weights, outputs, us, vs, saved, layout)
        native.spectral_norm_forward(str(dtype).removeprefix("torch."), rows, 1, 1e-12, False, 1, isa)
        for a, e, o in zip(outputs, exact, own, strict=True):
            assert_close(a, e, order=0, reference=o)


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_forwards_before_one_backward_use_their_own_u_and_v(backend):
    (weight,), us, vs, _, _ = operands([((6, 5), 0)], torch.float64, device_of(backend))
    first_u, first_v = us[0].clone(), vs[0].clone()
    weight.requires_grad_()
    both = [ops.spectral_norm([weight], us, vs, backend=backend)[0] for _ in range(2)]
    (grad,) = torch.autograd.grad(both[0].square().sum() - both[1].sum(), weight)
    both = [ops.spectral_norm([weight], [first_u], [first_v], backend="reference")[0] for _ in range(2)]
    (expected,) = torch.autograd.grad(both[0].square().sum() - both[1].sum(), weight)
    assert_close(grad, expected, order=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_weights_that_a_gradient_came_for_get_one(backend):
    shapes = [((4, 3), 0), ((5, 2), 0), ((2, 6, 3), 1)]
    weights, us, vs, dims, _ = operands(shapes, torch.float32, device_of(backend))
    weights[0].requires_grad_()
    weights[2].requires_grad_()
    outputs = ops.spectral_norm(weights, us, vs, dims=dims, backend=backend)
    (grad,) = torch.autograd.grad(outputs[2].square().sum(), weights[2], create_graph=True)
    grad.square().sum().backward()
    assert weights[0].grad is None
    assert weights[1].grad is None
    u, v = us[2].double(), vs[2].double()
    expected = weights[2].detach().double().requires_grad_()
    (output,) = ops.spectral_norm([expected], [u], [v], dims=[1], update=False, backend="reference")
    (expected_grad,) = torch.autograd.grad(output.square().sum(), expected, create_graph=True)
    expected_grad.square().sum().backward()
    assert_close(grad, expected_grad, order=1)
    assert_close(weights[2].grad, expected.grad, order=2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_dim_counts_from_the_end_as_well(backend):
    weights, us, vs, _, _ = operands([((4, 3, 6), 2)], torch.float32, device_of(backend))
    from_the_end, from_the_start = (
        ops.spectral_norm(weights, us, vs, dims=[dim], update=False, backend=backend)[0] for dim in (-1, 2)
    )
    assert torch.equal(from_the_end, from_the_start)


@settings(max_examples=60, deadline=None)
@given(
    shapes=st.lists(
        st.tuples(st.lists(st.integers(1, 9), min_size=2, max_size=4), st.integers(0, 3)),
        min_size=1,
        max_size=4,
    ),
    n=st.integers(0, 2),
    v_first=st.booleans(),
)
def test_any_shapes_match_on_the_cpu(shapes, n, v_first):
    problem = operands([(tuple(shape), dim % len(shape)) for shape, dim in shapes], torch.float64)
    for actual, expected in zip(
        run("cpu", problem, torch.float64, n=n, v_first=v_first),
        run("reference", problem, torch.float64, n=n, v_first=v_first),
        strict=True,
    ):
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-7, atol=1e-9)


W, U, V = torch.randn(4, 6), torch.randn(4), torch.randn(6)
BAD = {
    "a tensor for a list": (dict(weights=W), TypeError, "weights must be a list"),
    "not a tensor": (dict(weights=[W.tolist()]), TypeError, r"weights\[0\] must be a tensor"),
    "one dimension": (dict(weights=[U]), ValueError, r"weights\[0\] must be \(rows, columns\)"),
    "one dimension, dims given": (
        dict(weights=[U], vs=[V[:1]], dims=[0]),
        ValueError,
        r"weights\[0\] must have at least two dimensions",
    ),
    "three dimensions": (dict(weights=[W[None]]), ValueError, r"weights\[0\] must be \(rows, columns\)"),
    "empty": (dict(weights=[W[:0]], us=[U[:0]]), ValueError, r"weights\[0\] must not be empty"),
    "integers": (dict(weights=[W.long()]), TypeError, r"weights\[0\] must be float"),
    "integers throughout": (
        dict(weights=[W.long()], us=[U.long()], vs=[V.long()]),
        TypeError,
        r"weights\[0\] must be float",
    ),
    "complex": (dict(weights=[W.cfloat()]), TypeError, r"weights\[0\] must be float"),
    "mixed dtypes": (
        dict(weights=[W, W.double()], us=[U, U], vs=[V, V]),
        TypeError,
        r"weights\[1\] .* got torch.float64",
    ),
    "mixed devices": (
        dict(weights=[W, W.to("meta")], us=[U, U], vs=[V, V]),
        ValueError,
        r"weights\[1\] .* meta",
    ),
    "u on another device": (dict(us=[U.to("meta")]), ValueError, r"us\[0\] must be on its weight's device"),
    "wrong length of u": (
        dict(us=[U[:3]]),
        ValueError,
        r"us\[0\] must have shape \(4,\), the number of rows",
    ),
    "wrong length of v": (
        dict(vs=[U]),
        ValueError,
        r"vs\[0\] must have shape \(6,\), the number of columns",
    ),
    "dtype of u": (dict(us=[U.double()]), TypeError, r"us\[0\] must have its weight's dtype"),
    "strided u": (dict(us=[torch.randn(8)[::2]]), ValueError, r"us\[0\] must be contiguous"),
    "strided v": (dict(vs=[torch.randn(12)[::2]]), ValueError, r"vs\[0\] must be contiguous"),
    "lengths of lists": (dict(us=[U, U]), ValueError, "1 weights, 2 us, 1 vs"),
    "no iterations": (
        dict(n_power_iterations=0),
        ValueError,
        "n_power_iterations must be .* at least 1, got 0",
    ),
    "fractional iterations": (dict(n_power_iterations=1.5), ValueError, "n_power_iterations"),
    "eps": (dict(eps=0.0), ValueError, "eps must be positive"),
    "dim": (dict(dims=[2]), ValueError, r"weights\[0\] must have"),
    "backend": (dict(backend="cudnn"), ValueError, "backend must be one of"),
    "backend elsewhere": (dict(backend="cuda"), fastgan.BackendUnavailable, "cuda.*GPU"),
}


@pytest.mark.parametrize(("change", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input_raises_a_message_that_names_it_and_changes_nothing(change, error, message):
    u, v = U.clone(), V.clone()
    arguments = dict(weights=[W], us=[u], vs=[v]) | change
    with pytest.raises(error, match=message):
        ops.spectral_norm(arguments.pop("weights"), arguments.pop("us"), arguments.pop("vs"), **arguments)
    assert torch.equal(u, U)
    assert torch.equal(v, V)


def test_an_empty_list_gives_an_empty_list():
    assert ops.spectral_norm([], [], []) == []


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_leaves_the_sums_in_float32(backend):
    device = device_of(backend)
    problem = operands(LISTS["discriminator"], torch.float32, device)
    exact = run("reference", problem, torch.float64)
    with torch.autocast(device.type, torch.bfloat16):
        actual = run(backend, problem, torch.float32)
    for a, e in zip(actual[0], exact[0], strict=True):
        assert_close(a, e, order=0)
