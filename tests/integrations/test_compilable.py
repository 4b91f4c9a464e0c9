"""Functions with a derivative inside, wrapped by fastgan.compilable: one graph, PyTorch's numbers, four forwards."""

from __future__ import annotations

import copy
import functools
import shutil

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F
from torch.overrides import _get_current_function_mode_stack

import fastgan
from fastgan import backends
from tests.integrations.compiled_problem import (
    Counted,
    CountedEagerly,
    Critic,
    assert_same,
    gradients,
    images,
    make,
)

pytestmark = [
    pytest.mark.skipif(
        tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11), reason="before 2.11 the function breaks the graph"
    ),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.undo()  # poisoned memory cannot be traced
    torch.compiler.reset()
    yield
    assert not _get_current_function_mode_stack()
    assert not backends.is_lowered()


def run(function, *inputs, backend="aot_eager", **options):
    return torch.compile(function, backend=backend, **{"fullgraph": True, **options})(*inputs)


# ---- penalties by hand, in the forms that code bases use ----


def r1(model, real):
    real.requires_grad_()
    logits = model(real)
    (grad,) = torch.autograd.grad(logits.sum(), real, create_graph=True)
    return F.softplus(-logits).mean() + grad.square().sum((1, 2, 3)).mean()


def wgan_gp(model, real):
    alpha = torch.linspace(0, 1, len(real), dtype=real.dtype).view(-1, 1, 1, 1)
    mixed = (alpha * real + (1 - alpha) * real.flip(0)).requires_grad_(True)
    logits = model(mixed)
    grad = torch.autograd.grad(
        outputs=logits,
        inputs=mixed,
        grad_outputs=torch.ones_like(logits),
        create_graph=True,
        retain_graph=True,
        only_inputs=True,
    )[0]
    return ((grad.flatten(1).norm(2, dim=1) - 1) ** 2).mean()


def path_length(model, real):
    points = real.detach().requires_grad_()
    out = model.features(points)
    noise = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    (grad,) = torch.autograd.grad((out * noise).sum(), points, create_graph=True)
    lengths = grad.square().sum(2).mean(1).sqrt()
    return (lengths - lengths.mean().detach()).square().mean()


def two_inputs_and_one_unused(model, real):
    x, y, unused = real.detach().requires_grad_(), real.flip(0).requires_grad_(), real[:1].clone().requires_grad_()
    out = model(x * y)
    of_x, of_y, none = torch.autograd.grad(
        [out.mean(), out.square().sum()], (x, y, unused), None, None, True, True, True
    )
    assert none is None
    return of_x.square().mean() + of_y.square().mean()


def third_order(model, real):
    real.requires_grad_()
    (grad,) = torch.autograd.grad(model(real).sum(), real, create_graph=True)
    (again,) = torch.autograd.grad(grad.square().sum(), real, create_graph=True)
    return again.square().mean()


def step_of_an_inner_loop(model, real):
    weights = list(model.parameters())
    grads = torch.autograd.grad(model(real).square().mean(), weights, create_graph=True)
    return sum((weight - 0.1 * grad).square().sum() for weight, grad in zip(weights, grads, strict=True))


def first_order(model, real):
    real.requires_grad_()
    (grad,) = torch.autograd.grad(model(real).sum(), real)
    assert not grad.requires_grad
    return model(real + grad).mean()


def beside_fastgans_penalty(model, real):
    logits, penalty = fastgan.logits_and_penalty(model, real, kind="r1")
    return F.softplus(-logits).mean() + penalty + r1(model, real)


FUNCTIONS = [
    r1,
    wgan_gp,
    path_length,
    two_inputs_and_one_unused,
    third_order,
    step_of_an_inner_loop,
    first_order,
    beside_fastgans_penalty,
]


def assert_equals_pytorch(function, model, backend="aot_eager", tolerance=1e-4):
    twin, x = copy.deepcopy(model).double(), images()
    expected = gradients(twin, function(twin, x.double()))
    step = fastgan.compilable(function)
    assert_same(gradients(model, run(step, model, x, backend=backend)), expected, tolerance)
    assert not x.requires_grad
    for value, wanted in zip(model.state_dict().values(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(value.to(wanted.dtype), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_function_with_a_derivative_inside_is_one_graph_and_equals_pytorch(function):
    assert_equals_pytorch(function, Critic(activation=nn.SiLU()))


@pytest.mark.parametrize("name", ["leaky ReLU", "batch norm", "spectral norm", "fused spectral norm", "checkpointed"])
def test_discriminators_in_a_penalty_by_hand(name):
    assert_equals_pytorch(r1, make(name))


@pytest.mark.parametrize("function", [r1, two_inputs_and_one_unused])
def test_the_eager_backend_runs_the_function_at_each_step(function):
    assert_equals_pytorch(function, Critic(), backend="eager")


@pytest.mark.long
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="Inductor needs a C++ compiler")
def test_inductor_compiles_a_penalty_by_hand():
    assert_equals_pytorch(r1, make("minibatch stddev"), backend="inductor", tolerance=1e-3)


@pytest.mark.parametrize("name", ["leaky ReLU", "max pooling"])
def test_the_graph_holds_the_convolutions_of_twice_differentiable(name):
    backend, eager, plain, model, x = Counted(), CountedEagerly(), CountedEagerly(), make(name), images()
    weights = list(model.parameters())
    penalty = fastgan.compilable(wgan_gp)
    run(penalty, model, x, backend=backend).backward()
    for count, function in ((eager, penalty), (plain, wgan_gp)):
        with count:
            torch.autograd.grad(function(model, x.clone()), weights, allow_unused=True)
    assert backend.convolutions == eager.convolutions < plain.convolutions


# ---- losses on forces ----


class Potential(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(1, 8), nn.SiLU(), nn.Linear(8, 1))
        self.scale, self.offset, self.inside = 0.5, torch.tensor(0.1), {"cutoff": 5.0}

    def energy(self, positions):
        distances = (positions[:, None] - positions[None] + self.offset).square().sum(-1, keepdim=True)
        return self.layers(distances.clamp(max=self.inside["cutoff"])).sum() * self.scale

    def forward(self, positions, sign=-1):
        positions.requires_grad_(True)
        energy = self.energy(positions)
        (grad,) = torch.autograd.grad([energy], [positions], [torch.ones_like(energy)], create_graph=True)
        return energy, sign * grad


class Wrapped(Potential):
    @fastgan.compilable
    def forward(self, positions, sign=-1):
        return super().forward(positions, sign)


class Holder:
    def __init__(self, potential):
        self.potential = potential

    def __call__(self, positions):
        return self.potential(positions)


THE_POTENTIAL = Potential()


def of_a_global(positions):
    return THE_POTENTIAL(positions)


def of_an_attribute(holder):
    holder.positions.requires_grad_()
    energy = holder.potential.energy(holder.positions)
    return energy, -torch.autograd.grad(energy, holder.positions, create_graph=True)[0]


def through_an_attribute(potential):
    wrapped, holder = fastgan.compilable(of_an_attribute), Holder(potential)

    def call(positions):
        holder.positions = positions
        return wrapped(holder)

    return call


WRAPPINGS = {
    "a module": fastgan.compilable,
    "a bound method": lambda potential: fastgan.compilable(potential.forward),
    "a partial": lambda potential: fastgan.compilable(functools.partial(potential, sign=-1)),
    "a lambda": lambda potential: fastgan.compilable(lambda positions: potential(positions)),
    "an object": lambda potential: fastgan.compilable(Holder(potential)),
    "twice": lambda potential: fastgan.compilable(fastgan.compilable(potential)),
    "inside the step": lambda potential: lambda positions: fastgan.compilable(potential)(positions),
    "positions in an object": through_an_attribute,
}


def positions():
    return torch.randn(5, 3, generator=torch.Generator().manual_seed(2))


def on_forces(function):
    def loss(positions):
        energy, forces = function(positions)
        return (forces - 1).square().mean() + 0.1 * energy

    return loss


@pytest.mark.parametrize("way", WRAPPINGS)
def test_the_function_may_find_its_modules_anywhere(way):
    potential = Potential()
    expected = gradients(potential, on_forces(potential)(positions()))
    for whole in (True, False):
        torch.compiler.reset()
        loss = run(on_forces(WRAPPINGS[way](potential)), positions(), fullgraph=whole)
        assert_same(gradients(potential, loss), expected, 1e-5)


def test_a_decorated_method_and_a_global_module():
    for function, potential in ((model := Wrapped(), model), (fastgan.compilable(of_a_global), THE_POTENTIAL)):
        expected = gradients(potential, on_forces(lambda x, p=potential: Potential.forward(p, x))(positions()))
        assert_same(gradients(potential, run(on_forces(function), positions())), expected, 1e-5)


def test_a_changed_flag_number_or_tensor_is_seen():
    potential = Potential()
    compiled = torch.compile(on_forces(fastgan.compilable(potential)), backend="aot_eager", fullgraph=True)
    for name, value in (("scale", 2.0), ("offset", torch.tensor(0.3)), ("inside", {"cutoff": 1.0})):
        compiled(positions())
        setattr(potential, name, value)
        torch.testing.assert_close(compiled(positions()), on_forces(potential)(positions()))


def test_one_dynamic_graph_works_for_all_sizes():
    potential, counter = Potential(), CompileCounter()
    compiled = torch.compile(on_forces(fastgan.compilable(potential)), backend=counter, fullgraph=True, dynamic=True)
    for n in (4, 6, 5):
        torch.testing.assert_close(compiled(torch.ones(n, 3)), on_forces(potential)(torch.ones(n, 3)))
    assert counter.frame_count == 1


def test_inputs_that_require_a_gradient_get_it():
    potential, ours, theirs = Potential(), positions().requires_grad_(), positions().requires_grad_()
    run(on_forces(fastgan.compilable(potential)), ours).backward()
    on_forces(potential)(theirs).backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_forces_in_an_evaluation_without_gradients(backend):
    potential = Potential()

    def evaluate(positions):
        with torch.no_grad():
            with torch.enable_grad():
                _, forces = fastgan.compilable(potential)(positions)
            return forces * 2

    forces = run(evaluate, positions(), backend=backend)
    torch.testing.assert_close(forces, 2 * potential(positions())[1].detach())
    assert not forces.requires_grad


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("gradients_outside", [True, False])
def test_an_energy_whose_graph_is_freed_by_its_forces(gradients_outside, backend):
    potential = Potential()

    def evaluate(positions):
        with torch.enable_grad():
            positions = positions.detach().requires_grad_()
            energy = potential.energy(positions)
            (grad,) = torch.autograd.grad(energy, positions)  # retain_graph=False
        return energy, -grad

    with torch.set_grad_enabled(gradients_outside):
        energy, forces = run(fastgan.compilable(evaluate), positions(), backend=backend)
    torch.testing.assert_close((energy, forces), evaluate(positions()))
    assert not forces.requires_grad


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * ctx.saved_tensors[0] * grad


def of_a_custom_function(model, real):
    return r1(lambda x: Square.apply(model(x)), real)


def batched(model, real):
    real.requires_grad_()
    logits = model(real)
    return torch.autograd.grad(logits, real, torch.eye(4)[:, :, None], create_graph=True, is_grads_batched=True)[
        0
    ].sum()


def unused(model, real):
    return torch.autograd.grad(model(real).sum(), real.detach().requires_grad_(), create_graph=True)[0].sum()


REFUSED = {
    "custom autograd.Function": of_a_custom_function,
    "is_grads_batched": batched,
    "appears to not have been used in the graph": unused,
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_refused(message):
    with pytest.raises(Exception, match=message):
        run(fastgan.compilable(REFUSED[message]), Critic(), images())


def test_no_gradients_raise_as_in_eager_mode():
    with torch.no_grad(), pytest.raises(RuntimeError, match="does not require grad"):
        run(fastgan.compilable(r1), Critic(), images())


def test_a_function_that_breaks_the_graph_runs_eagerly():
    model = Critic()

    def broken(model, real):
        torch._dynamo.graph_break()
        return r1(model, real)

    expected = gradients(model, r1(model, images()))
    assert_same(gradients(model, run(fastgan.compilable(broken), model, images(), fullgraph=False)), expected, 1e-5)


def test_the_wrapper_keeps_the_name_and_refuses_what_cannot_be_called():
    assert fastgan.compilable(r1).__name__ == "r1"
    with pytest.raises(TypeError, match="must be callable, got int"):
        fastgan.compilable(3)
