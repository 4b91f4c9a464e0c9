from __future__ import annotations

import copy
import io
import pickle
import sys
import types

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.nn.utils import spectral_norm as torch_hook

import fastgan
from fastgan import nn as fnn
from tests.harness import assert_close

IMAGES = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(3))


class MethodNorm:
    """A weight's norm by v first, then u; in evaluation an iteration too, which is not stored."""

    def set_up(self, u, sigma, iterations=1, eps=1e-12):
        self.names, self.iterations_, self.eps = (u, sigma), iterations, eps
        self.register_buffer(u, torch.randn(1, self.weight.shape[0]))
        self.register_buffer(sigma, torch.ones(1))

    def normalised(self):
        matrix, u = self.weight.flatten(1), getattr(self, self.names[0])
        with torch.no_grad():
            for _ in range(self.iterations_):
                v = F.normalize(u @ matrix, eps=self.eps)
                u = F.normalize(v @ matrix.t(), eps=self.eps)
        sigma = (v @ matrix.t() @ u.t()).squeeze()
        if self.training:
            with torch.no_grad():
                for name, value in zip(self.names, (u, sigma), strict=True):
                    getattr(self, name).copy_(value)
        return self.weight / sigma


class BigConv(nn.Conv2d, MethodNorm):
    """In BigGAN's style."""

    def __init__(self, *args, num_itrs=1, eps=1e-6):
        super().__init__(*args)
        self.num_itrs = num_itrs
        self.set_up("u0", "sv0", num_itrs, eps)

    def W_(self):  # noqa: N802
        return self.normalised()

    def forward(self, x):
        return F.conv2d(x, self.W_(), self.bias, self.stride, self.padding)


class BigLinear(nn.Linear, MethodNorm):
    def __init__(self, *args):
        super().__init__(*args)
        self.set_up("u0", "sv0", eps=1e-6)

    def W_(self):  # noqa: N802
        return self.normalised()

    def forward(self, x):
        return F.linear(x, self.W_(), self.bias)


class SnConv(nn.Conv2d, MethodNorm):
    """In the style of sn_u and sn_sigma."""

    def __init__(self, *args):
        super().__init__(*args)
        self.set_up("sn_u", "sn_sigma")

    def sn_weights(self):
        return self.normalised()

    def forward(self, x):
        return F.conv2d(x, self.sn_weights(), self.bias, self.stride, self.padding)


class SnLinear(nn.Linear, MethodNorm):
    """The same, with a property."""

    def __init__(self, *args):
        super().__init__(*args)
        self.set_up("sn_u", "sn_sigma")

    @property
    def sn_weight(self):
        return self.normalised()

    def forward(self, x):
        return F.linear(x, self.sn_weight, self.bias)


class BarNorm(nn.Module):
    """In the style of weight_bar: a wrapper, which iterates at each forward and adds eps to the norm."""

    def __init__(self, module, name="weight", power_iterations=1):
        super().__init__()
        self.module, self.name, self.power_iterations = module, name, power_iterations
        weight = module._parameters.pop(name)
        matrix = weight.detach().flatten(1)
        for suffix, size in (("_u", matrix.shape[0]), ("_v", matrix.shape[1])):
            vector = nn.Parameter(F.normalize(torch.randn(size), dim=0), requires_grad=False)
            module.register_parameter(name + suffix, vector)
        module.register_parameter(name + "_bar", nn.Parameter(weight.detach()))

    def _update_u_v(self):
        weight, u, v = (getattr(self.module, self.name + suffix) for suffix in ("_bar", "_u", "_v"))
        matrix = weight.flatten(1)
        for _ in range(self.power_iterations):
            for vector, product in ((v, lambda: matrix.detach().t() @ u), (u, lambda: matrix.detach() @ v)):
                values = product().detach()
                vector.data = values / (values.norm() + 1e-12)
        setattr(self.module, self.name, weight / u.dot(matrix @ v))

    def forward(self, x):
        self._update_u_v()
        return self.module(x)


class StridedStd(nn.Module):
    def __init__(self, group_size, num_channels=1):
        super().__init__()
        self.group_size, self.num_channels = group_size, num_channels

    def group(self, x, size):
        return x.reshape(size, -1, self.num_channels, x.shape[1] // self.num_channels, *x.shape[2:])

    def spread(self, y, size):
        return y.repeat(size, 1, 1, 1)

    def variance(self, y):
        return (y - y.mean(0)).square().mean(0)

    def forward(self, x):
        size = min(self.group_size or len(x), len(x))
        y = (self.variance(self.group(x, size)) + 1e-8).sqrt().mean([2, 3, 4], keepdim=True).squeeze(2)
        return torch.cat([x, self.spread(y, size).expand(-1, -1, *x.shape[2:])], 1)


class MinibatchStdLayer(StridedStd):
    pass


class ContiguousMinibatchStd(StridedStd):
    def group(self, x, size):
        return x.reshape(-1, size, self.num_channels, x.shape[1] // self.num_channels, *x.shape[2:]).transpose(0, 1)

    def spread(self, y, size):
        return y.repeat_interleave(size, 0)


class UnbiasedMinibatchStd(StridedStd):
    def variance(self, y):
        return y.var(0)


class MinibatchStdOfAnotherEps(StridedStd):
    def variance(self, y):
        return super().variance(y).clamp(min=1e-8) - 1e-8


class WholeBatchMinibatchStd(StridedStd):
    """Where groups do not divide the batch, the batch is the group."""

    def forward(self, x):
        self.group_size, kept = len(x) if len(x) % min(self.group_size, len(x)) else self.group_size, self.group_size
        try:
            return super().forward(x)
        finally:
            self.group_size = kept


class Discrimination(nn.Module):
    def __init__(self, in_features, kernels, dim, mean=False):
        super().__init__()
        self.T = nn.Parameter(torch.randn(in_features, kernels, dim) / in_features**0.5)
        self.mean = mean

    def closeness(self, distances):
        return torch.exp(-distances).sum(0) - 1

    def forward(self, x):
        m = (x @ self.T.flatten(1)).view(-1, *self.T.shape[1:])
        o = self.closeness((m[None] - m[:, None]).abs().sum(3))
        return torch.cat([x, o / (len(x) - 1) if self.mean else o], 1)


class SquaredDiscrimination(Discrimination):
    def closeness(self, distances):
        return torch.exp(-distances.square()).sum(0) - 1


def discriminator(conv, linear, last=nn.Flatten):
    return nn.Sequential(conv(3, 6, 3), nn.LeakyReLU(0.2), conv(6, 4, 3), last(), linear(64, 1))


STYLES = {
    "parametrization": lambda: discriminator(
        lambda *a: parametrizations.spectral_norm(nn.Conv2d(*a)),
        lambda *a: parametrizations.spectral_norm(nn.Linear(*a)),
    ),
    "hook": lambda: discriminator(lambda *a: torch_hook(nn.Conv2d(*a)), lambda *a: torch_hook(nn.Linear(*a))),
    "u0, sv0": lambda: discriminator(BigConv, BigLinear),
    "sn_u, sn_sigma": lambda: discriminator(SnConv, SnLinear),
    "weight_bar": lambda: discriminator(lambda *a: BarNorm(nn.Conv2d(*a)), lambda *a: BarNorm(nn.Linear(*a))),
}
OTHERS = {
    "stddev": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), MinibatchStdLayer(4), nn.Flatten(), nn.Linear(180, 1)),
    "discrimination": lambda: nn.Sequential(nn.Flatten(), Discrimination(192, 5, 3), nn.Linear(197, 1)),
}
MODELS = {**STYLES, **OTHERS}


def checkpoint_of(make):
    """The state of a model that has been trained a little."""
    torch.manual_seed(5)
    model = make()
    train(model, steps=3)
    return copy.deepcopy(model.state_dict())


def loaded(make, state):
    model = make()
    model.load_state_dict(state)
    return model


def train(model, steps, optimizer=None, one_forward=False):
    """The losses of a critic with a penalty every fourth step, in its place where a step has one forward."""
    optimizer = optimizer or torch.optim.Adam(model.parameters(), 2e-3)
    generator = torch.Generator().manual_seed(11)
    losses = []
    for step in range(steps):
        real, fake = torch.randn(2, 8, 3, 8, 8, generator=generator)
        penalty = fastgan.gradient_penalty(model, real, kind="r1", weight=0.5) if step % 4 == 0 else 0
        if one_forward:
            signs = torch.tensor([-1.0, 1.0]).repeat_interleave(8)[:, None]
            loss = penalty if step % 4 == 0 else F.softplus(signs * model(torch.cat([real + 0.5, fake]))).mean()
        else:
            loss = F.softplus(-model(real + 0.5)).mean() + F.softplus(model(fake)).mean() + penalty
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses)


@pytest.mark.parametrize("name", MODELS)
def test_a_converted_checkpoint_evaluates_and_trains_as_it_did(name):
    state = checkpoint_of(MODELS[name])
    model, converted = loaded(MODELS[name], state), loaded(MODELS[name], state)
    report = fastgan.convert(converted)
    assert report.replaced
    assert_close(converted.eval()(IMAGES), model.eval()(IMAGES).double(), order=0)
    # weight_bar as it stands is wrong after two forwards before one backward: see the test of that.
    expected, actual = (train(m.train(), 32, one_forward=name == "weight_bar") for m in (model, converted))
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)
    for key, value in converted.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[key], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("name", MODELS)
def test_the_state_dict_keeps_its_keys_and_goes_both_ways(name):
    state = checkpoint_of(MODELS[name])
    converted = MODELS[name]()
    fastgan.convert(converted)
    assert list(converted.state_dict()) == list(state)
    converted.load_state_dict(state)
    back = loaded(MODELS[name], converted.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(back.state_dict().values(), state.values(), strict=True))
    assert back.state_dict()._metadata == converted.state_dict()._metadata
    assert_close(back.eval()(IMAGES), converted.eval()(IMAGES).double(), order=0)


@pytest.mark.parametrize("name", MODELS)
def test_reverting_gives_back_classes_and_results(name):
    model = MODELS[name]()
    untouched = copy.deepcopy(model)
    classes = [type(m) for m in model.modules()]
    hooks = [type(h) for m in model.modules() for h in m._forward_pre_hooks.values()]
    tensors = [*model.parameters(), *model.buffers()]
    fastgan.convert(model)
    assert fastgan.revert(model) is model
    assert [type(m) for m in model.modules()] == classes
    assert [type(h) for m in model.modules() for h in m._forward_pre_hooks.values()] == hooks
    assert all(a is b for a, b in zip([*model.parameters(), *model.buffers()], tensors, strict=True))
    assert not any("fastgan" in key for m in model.modules() for key in vars(m))
    assert torch.equal(model(IMAGES), untouched(IMAGES))


@pytest.mark.parametrize("name", MODELS)
def test_copies_and_pickles_of_a_converted_model_stay_converted(name):
    model = MODELS[name]()
    fastgan.convert(model)
    model(IMAGES).sum().backward()
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)]
    expected = model.eval()(IMAGES)
    for other in copies:
        # PyTorch makes a class for each parametrized module, a copy's too.
        assert [type(m).__name__ for m in other.modules()] == [type(m).__name__ for m in model.modules()]
        assert torch.equal(other.eval()(IMAGES), expected)
        assert torch.equal(fastgan.revert(other)(IMAGES), fastgan.revert(copy.deepcopy(model))(IMAGES))


@pytest.mark.parametrize("name", MODELS)
def test_verify_compares_with_the_model_as_it_was_and_changes_nothing(name):
    model = MODELS[name]()
    report = fastgan.convert(model)
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    verification = report.verify(IMAGES)
    assert verification.equal, str(verification)
    assert [d.kind for d in verification.differences] == ["output", "gradient", "penalty", "state"]
    assert "equal up to rounding" in str(verification)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), state.values(), strict=True))
    assert torch.equal(torch.get_rng_state(), random)


def test_verify_sees_a_wrong_replacement(monkeypatch):
    model = STYLES["u0, sv0"]()
    report = fastgan.convert(model)
    whole = fastgan.ops.spectral_norm
    monkeypatch.setattr(fastgan.ops, "spectral_norm", lambda *a, **k: [1.001 * w for w in whole(*a, **k)])
    verification = report.verify([IMAGES])
    assert not verification.equal
    assert "NOT EQUAL" in str(verification)
    with pytest.raises(TypeError, match="sample_inputs must be a tensor or begin with one, got str"):
        report.verify(["images"])


def test_an_optimizer_made_before_goes_on():
    model = STYLES["u0, sv0"]()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    train(model, 2, optimizer)
    before = model[0].weight.clone()
    fastgan.convert(model)
    train(model, 2, optimizer)
    assert not torch.equal(model[0].weight, before)
    assert len(optimizer.state) == len(list(model.parameters()))


def test_hooks_stay_and_fire():
    model = OTHERS["stddev"]()
    seen = []
    model[1].register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    fastgan.convert(model)
    model(IMAGES)
    assert seen == [(8, 5, 6, 6)]


def test_distributed_data_parallel_wraps_a_converted_model(tmp_path):
    import torch.distributed as dist

    model = nn.Sequential(*STYLES["u0, sv0"]()[:2], MinibatchStdLayer(4), nn.Flatten(), nn.LazyLinear(1))
    model(IMAGES)
    alone = copy.deepcopy(model)
    fastgan.convert(model)
    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        for net in (wrapped, alone):
            net(IMAGES).square().sum().backward()
    finally:
        dist.destroy_process_group()
    for a, e in zip(model.parameters(), alone.parameters(), strict=True):
        assert_close(a.grad, e.grad.double(), order=1)


def test_two_forwards_before_one_backward_are_right_in_the_wrapped_style_too():
    # As it stands, the first forward's u and v are overwritten before its backward reads them.
    converted = STYLES["weight_bar"]()
    exact = copy.deepcopy(converted)
    fastgan.convert(converted)
    separate = []
    for x in (IMAGES, 2 * IMAGES):
        exact(x).sum().backward()
        separate.append([p.grad.clone() for p in exact.parameters() if p.requires_grad])
        exact.zero_grad()
    (converted(IMAGES).sum() + converted(2 * IMAGES).sum()).backward()
    for p, a, b in zip([p for p in converted.parameters() if p.requires_grad], *separate, strict=True):
        assert_close(p.grad, (a + b).double(), order=1)


@pytest.mark.parametrize("iterations", [1, 3])
@pytest.mark.parametrize("kind", [BigConv, BarNorm])
def test_the_number_of_iterations_is_found(kind, iterations):
    module = (
        BigConv(3, 5, 3, num_itrs=iterations) if kind is BigConv else BarNorm(nn.Conv2d(3, 5, 3), "weight", iterations)
    )
    converted = copy.deepcopy(module)
    (row,) = fastgan.convert(converted).replaced
    assert row.replaced_by == "fused spectral norm"
    assert_close(converted(IMAGES), module(IMAGES).double(), order=0)


class StoresInEvaluation(BigConv):
    def normalised(self):
        training, self.training = self.training, True
        try:
            return super().normalised()
        finally:
            self.training = training


class Clamped(BigConv):
    def normalised(self):
        return super().normalised() * 0.99


def test_what_differs_in_a_style_is_left_alone_with_the_difference():
    for kind in (StoresInEvaluation, Clamped):
        module = kind(3, 5, 3)
        (row,) = fastgan.convert(module).rows
        assert row.replaced_by is None
        assert "its W_ is not ours: differs by" in row.reason
        assert type(module) is kind
    several = BigConv(3, 5, 3)
    several.register_buffer("u1", torch.randn(1, 5))
    assert fastgan.convert(several).rows[0].reason == "several singular values"


@pytest.mark.parametrize(("group_size", "channels"), [(4, 1), (2, 2), (3, 1), (None, 1)])
def test_minibatch_stddev_is_found_by_name_and_settings(group_size, channels):
    layer = MinibatchStdLayer(group_size, channels)
    original = copy.deepcopy(layer)
    (row,) = fastgan.convert(layer).rows
    assert row.replaced_by == "minibatch_stddev"
    assert f"'group_size': {group_size}, 'num_channels': {channels}, 'eps': 1e-08" in row.reason
    x = torch.randn(12, 4, 5, 5)
    assert_close(layer(x), original(x).double(), order=0)


@pytest.mark.parametrize(
    "kind", [ContiguousMinibatchStd, UnbiasedMinibatchStd, MinibatchStdOfAnotherEps, WholeBatchMinibatchStd]
)
def test_another_minibatch_statistic_is_left_alone(kind):
    layer = kind(4)
    (row,) = fastgan.convert(layer).rows
    assert row.replaced_by is None
    assert "another statistic" in row.reason
    assert type(layer) is kind


class MinibatchStdWithNaN(StridedStd):
    def forward(self, x):
        return super().forward(x) * (float("nan") if len(x) == 1 else 1.0)


def test_what_is_not_finite_is_equal_to_nothing():
    assert fastgan.convert(MinibatchStdWithNaN(4)).rows[0].replaced_by is None


def test_converting_draws_no_random_numbers_and_asks_no_hooks():
    model = nn.Sequential(*STYLES["sn_u, sn_sigma"](), MinibatchStdLayer(4), Discrimination(4, 3, 2))
    called = []
    for module in model:
        module.register_forward_pre_hook(lambda *_: called.append(1))
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    assert len(fastgan.convert(model).replaced) == 5
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), state.values(), strict=True))
    assert not called


def test_a_name_alone_replaces_nothing():
    class MinibatchStdOfNothing(nn.Module):
        def forward(self, x):
            raise NotImplementedError("no image")

    (row,) = fastgan.convert(MinibatchStdOfNothing()).rows
    assert (row.replaced_by, row.reason) == (None, "could not be tried: NotImplementedError: no image")


def test_a_class_that_carries_its_own_source_code_through_pickles_is_replaced():
    # As StyleGAN's pickles do: the class is made anew from its source, in a module that cannot be imported.
    source = "class MinibatchStdLayer(Base):\n    def __reduce__(self):\n        return remake, (vars(self),)\n"
    made = types.ModuleType("_made_from_a_pickle")
    made.Base, made.remake = StridedStd, remake
    exec(source, made.__dict__)
    SOURCES.append(made.MinibatchStdLayer)
    layer = made.MinibatchStdLayer(4)
    assert "_made_from_a_pickle" not in sys.modules
    assert fastgan.convert(layer).rows[0].replaced_by == "minibatch_stddev"
    x = torch.randn(8, 3, 4, 4)
    for other in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert isinstance(other, made.MinibatchStdLayer)
        assert torch.equal(other(x), fnn.MinibatchStdDev(4)(x))
        assert type(fastgan.revert(other)) is made.MinibatchStdLayer


SOURCES: list[type] = []


def remake(state):
    module = SOURCES[-1].__new__(SOURCES[-1])
    module.__dict__.update(state)
    return module


@pytest.mark.parametrize("mean", [False, True])
def test_minibatch_discrimination_is_found_by_its_parameter(mean):
    layer = Discrimination(6, 4, 3, mean)
    original = copy.deepcopy(layer)
    (row,) = fastgan.convert(layer).rows
    assert row.replaced_by == "minibatch_discrimination"
    x = torch.randn(9, 6)
    assert_close(layer(x), original(x).double(), order=0)
    other = SquaredDiscrimination(6, 4, 3)
    (row,) = fastgan.convert(other).rows
    assert "another function of T" in row.reason
    assert type(other) is SquaredDiscrimination


def test_every_module_is_listed_with_what_became_of_it():
    model = nn.Sequential(
        torch_hook(nn.Conv2d(3, 4, 3)),
        nn.LeakyReLU(),
        nn.BatchNorm2d(4),
        MinibatchStdLayer(4),
        ContiguousMinibatchStd(4),
        fnn.MinibatchStdDev(),
        nn.Flatten(),
        parametrizations.spectral_norm(nn.Linear(252, 1)),
    )
    report = fastgan.convert(model)
    assert [(row.path, row.module) for row in report.rows] == [
        *(("0", "Conv2d"), ("1", "LeakyReLU"), ("2", "BatchNorm2d"), ("3", "MinibatchStdLayer")),
        *(("4", "ContiguousMinibatchStd"), ("5", "MinibatchStdDev"), ("6", "Flatten"), ("7", "Linear")),
    ]
    assert [row.path for row in report.replaced] == ["0", "3", "7"]
    reasons = {row.path: row.reason for row in report.rows}
    assert "one call a forward for 2 weights; a weight used twice in a forward is iterated once" in reasons["0"]
    assert "its calls are rerouted" in reasons["1"]
    assert reasons["5"] == "fastgan's already"
    assert "3 replaced, 5 left alone" in str(report)
    assert len(str(report).splitlines()) == 11
    again = fastgan.convert(model)
    assert not again.replaced
    assert report.verify(IMAGES).equal


def test_what_was_fastgans_before_stays_so_after_a_reversion():
    model = fnn.utils.fuse_spectral_norm(STYLES["parametrization"]())
    assert not fastgan.convert(model).replaced
    fastgan.revert(model)
    assert len(model._forward_pre_hooks) == 1
    model.append(torch_hook(nn.Linear(1, 1)))
    (row,) = fastgan.convert(model).replaced
    assert row.path == "5"
    fastgan.revert(model)
    assert len(model._forward_pre_hooks) == 1
    assert isinstance(model[0].parametrizations.weight[0], fnn.utils.SpectralNorm)


@pytest.mark.parametrize("call", [fastgan.convert, fastgan.revert])
def test_what_is_no_module_is_refused(call):
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got list"):
        call([])
