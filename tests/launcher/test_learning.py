"""The launcher in scripts of each kind: the same losses, and the same gradients of None or zeros."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastgan
from fastgan.convert import Difference, Report, Verification
from fastgan.launcher import session
from fastgan.torch_private import function_modes
from tests.convert.named_stand_ins import MinibatchStdLayer

STEPS = 14
MAKERS = {}


def script(function):
    """A function that trains, and yields after each step what it computed."""
    MAKERS[function.__name__] = function
    return function


class Discriminator(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, stride=2)
        self.last = nn.Linear(8, 1)

    def features(self, x):
        return F.leaky_relu(self.second(F.leaky_relu(self.first(x), 0.2)), 0.2)

    def forward(self, x):
        return self.last(self.features(x).mean((2, 3)))


def penalty(discriminator, x):
    (grad,) = torch.autograd.grad(discriminator(x).sum(), x, create_graph=True)
    return (grad.flatten(1).norm(dim=1) - 1).square().mean()


def data():
    return torch.randn(4, 3, 8, 8), torch.randn(4, 5)


def models():
    return Discriminator(), nn.Sequential(nn.Linear(5, 3 * 64), nn.Unflatten(1, (3, 8, 8)))


@script
def wgan_gp(d, g, steps):
    d_optimizer, g_optimizer = torch.optim.Adam(d.parameters(), 1e-3), torch.optim.Adam(g.parameters(), 1e-3)
    for _ in range(steps):
        real, z = data()
        fake = g(z).detach()
        x = (real + torch.rand(4, 1, 1, 1) * (fake - real)).requires_grad_()
        loss = d(fake).mean() - d(real).mean() + 10 * penalty(d, x)
        d_optimizer.zero_grad()
        loss.backward()
        yield loss, d
        d_optimizer.step()
        g_optimizer.zero_grad()
        g_loss = -d(g(z)).mean()
        g_loss.backward()
        g_optimizer.step()


@script
def a_backward_and_a_step_of_its_own(d, g, steps):
    optimizer = torch.optim.SGD(d.parameters(), 1e-2, momentum=0.9)
    for number in range(steps):
        real, z = data()
        optimizer.zero_grad()
        loss = F.softplus(d(g(z).detach())).mean() + F.softplus(-d(real)).mean()
        loss.backward()
        optimizer.step()
        if number % 2 == 0:
            optimizer.zero_grad()
            x = real.detach().requires_grad_()
            r1 = penalty(d, x)
            r1.backward()
            yield r1, d
            optimizer.step()


@script
def r1_through_a_method(d, g, steps):
    optimizer = torch.optim.Adam(d.parameters(), 1e-3)
    for _ in range(steps):
        x = data()[0].requires_grad_()
        (grad,) = torch.autograd.grad(d.features(x).sum(), x, create_graph=True)
        loss = grad.square().sum() + d(x.detach()).mean()
        optimizer.zero_grad()
        loss.backward()
        yield loss, d
        optimizer.step()


@script
def r1_by_backward(d, g, steps):
    optimizer = torch.optim.Adam(d.parameters(), 1e-3)
    for _ in range(steps):
        x = data()[0].requires_grad_()
        optimizer.zero_grad()
        d(x).sum().backward(create_graph=True)
        loss = x.grad.square().sum()
        x.grad = None
        loss.backward()
        yield loss, d
        optimizer.step()


@script
def a_penalty_alone(d, g, steps):
    optimizer = torch.optim.AdamW(d.parameters(), 1e-3)
    for _ in range(steps):
        loss = penalty(d, data()[0].requires_grad_())
        optimizer.zero_grad()
        loss.backward()
        yield loss, d
        optimizer.step()


@script
def two_discriminators_of_one_loop(d, g, steps):
    both = nn.ModuleList([d, Discriminator()])
    optimizers = [torch.optim.Adam(one.parameters(), 1e-3) for one in both]
    for _ in range(steps):
        x = data()[0].requires_grad_()
        loss = sum(penalty(one, x) + one(x.detach()).mean() for one in both)
        both.zero_grad()
        loss.backward()
        yield loss, both
        for optimizer in optimizers:
            optimizer.step()


@script
def a_gradient_of_a_gradient_in_a_loop(d, g, steps):
    optimizer = torch.optim.SGD(d.parameters(), 1e-3)
    for _ in range(steps):
        x = data()[0].requires_grad_()
        y = torch.tanh(d(x)).sum()
        for _ in range(2):
            y = torch.autograd.grad(y, x, create_graph=True)[0].square().sum()
        optimizer.zero_grad()
        y.backward()
        yield y, d
        optimizer.step()


@script
def hvp(d, g, steps):
    optimizer = torch.optim.SGD(d.parameters(), 1e-3)
    for _ in range(steps):
        x = data()[0].requires_grad_()
        (grad,) = torch.autograd.grad(d(x).sum(), x, create_graph=True)
        (product,) = torch.autograd.grad((grad * torch.ones_like(grad)).square().sum(), x, create_graph=True)
        loss = product.square().sum() + d(x).mean()
        optimizer.zero_grad()
        loss.backward()
        yield loss, d
        optimizer.step()


@script
def nothing_to_gain(d, g, steps):
    optimizer = torch.optim.Adam(d.parameters(), 1e-3)
    for _ in range(steps):
        loss = F.relu(1 + d(g(data()[1]).detach())).mean()
        optimizer.zero_grad()
        loss.backward()
        yield loss, d
        optimizer.step()


class Augmented(nn.Module):
    """Changes images on their way to the discriminator, and makes them require a gradient, as lightweight-gan does."""

    def __init__(self, d):
        super().__init__()
        self.d = d

    def forward(self, images, needs_gradient=False):
        images = images.detach() if needs_gradient else images
        images = images.flip(3).requires_grad_() if needs_gradient else images.flip(3)
        return images, self.d(images)


@script
def a_wrapper_that_makes_its_input_require_a_gradient(d, g, steps):
    wrapper = Augmented(d)
    d_optimizer, g_optimizer = torch.optim.Adam(d.parameters(), 1e-3), torch.optim.Adam(g.parameters(), 1e-3)
    for _ in range(steps):
        real, z = data()
        _, fake_logits = wrapper(g(z).detach(), False)
        images, logits = wrapper(real, True)
        (grad,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
        loss = F.softplus(-logits).mean() + F.softplus(fake_logits).mean() + 5 * grad.square().sum((1, 2, 3)).mean()
        d_optimizer.zero_grad()
        loss.backward()
        yield loss, d
        d_optimizer.step()
        g_optimizer.zero_grad()
        F.softplus(-wrapper(g(z))[1]).mean().backward()
        g_optimizer.step()


@script
def ctgans_loop(d, g, steps):
    """The fake is not detached, the penalty goes first, and gradients are set to zeros."""
    d_optimizer, g_optimizer = torch.optim.Adam(d.parameters(), 1e-3), torch.optim.Adam(g.parameters(), 1e-3)
    for _ in range(steps):
        real, z = data()
        fake = g(z)
        logits, alpha = d(fake), torch.rand(4, 1, 1, 1)
        loss = logits.mean() - d(real).mean()
        pen = penalty(d, alpha * real + (1 - alpha) * fake)
        d_optimizer.zero_grad(set_to_none=False)
        pen.backward(retain_graph=True)
        loss.backward()
        yield pen, d
        d_optimizer.step()
        g_optimizer.zero_grad(set_to_none=False)
        (-d(g(data()[1])).mean()).backward()
        g_optimizer.step()


class Styled(nn.Module):
    """Returns an image and the style that it was made with."""

    def __init__(self):
        super().__init__()
        self.mapping = nn.Sequential(nn.Linear(5, 6), nn.LeakyReLU(0.2), nn.Linear(6, 6), nn.LeakyReLU(0.2))
        self.first, self.conv = nn.Linear(6, 4 * 16), nn.ConvTranspose2d(4, 3, 4, stride=2, padding=1)

    def forward(self, z):
        w = self.mapping(z)
        return self.conv(F.leaky_relu(self.first(w), 0.2).view(-1, 4, 4, 4)), w


@script
def path_length(d, g, steps):
    g = Styled()
    optimizer = torch.optim.Adam([*g.parameters(), *d.parameters()], 1e-3)
    for number in range(steps):
        _, z = data()
        images, w = g(z)
        loss = F.softplus(-d(images)).mean()
        if number % 2 == 0:
            (grad,) = torch.autograd.grad((images * torch.randn_like(images)).sum(), w, create_graph=True)
            loss = loss + (grad.square().sum(1).sqrt() - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        yield loss, g
        optimizer.step()


def pattern(d):
    def kind(grad):
        return None if grad is None else "zeros" if not grad.any() else "values"

    return {name: kind(p.grad) for name, p in d.named_parameters()}


def run(name, steps=STEPS):
    torch.manual_seed(1)
    d, g = models()
    return [
        (loss.item(), pattern(d), [p.grad if p.grad is None else p.grad.clone() for p in d.parameters()])
        for loss, d in MAKERS[name](d, g, steps)
    ]


@pytest.fixture
def learned(monkeypatch):
    """The session of the last context, after its end."""
    sessions = []
    begin = session.begin
    monkeypatch.setattr(session, "begin", lambda settings: sessions.append(begin(settings)) or sessions[-1])
    return sessions


@pytest.mark.parametrize("always", [True, False], ids=["always", "timed"])
@pytest.mark.parametrize("name", MAKERS)
def test_losses_gradients_and_zeros_are_the_same(name, always, learned, capsys):
    expected = run(name)
    with fastgan.enabled(always=always):
        actual = run(name)
    for (loss, kinds, grads), (plain_loss, plain_kinds, plain_grads) in zip(actual, expected, strict=True):
        assert loss == pytest.approx(plain_loss, rel=1e-4, abs=1e-5)
        assert kinds == plain_kinds
        for grad, plain in zip(grads, plain_grads, strict=True):
            if plain is not None:
                torch.testing.assert_close(grad, plain, rtol=1e-3, atol=1e-5)
    units, refused = learned[0].units, learned[0].refused
    if name in ("hvp", "a_gradient_of_a_gradient_in_a_loop"):
        assert not units
        assert "more than twice" in " ".join(refused.values())
    elif name == "nothing_to_gain":
        assert not units
        assert not refused
        assert capsys.readouterr().err == ""
    else:
        assert units
        assert sum(len(unit.work) for unit in units) >= 2
        assert "penalized call" in capsys.readouterr().err


def test_only_the_penalized_calls_are_rerouted_and_do_less_work(learned):
    with fastgan.enabled(always=True):
        run("wgan_gp")
    (unit,) = learned[0].units
    assert unit.name == "Discriminator"
    assert unit.steps == STEPS - 1  # the first step shows the penalty
    assert unit.work[True] < unit.work[False]
    assert torch.autograd.grad is session._grad
    assert torch.autograd.backward is session._backward
    assert not torch.nn.modules.module._global_forward_hooks


def test_a_wrappers_inner_module_is_rerouted_where_its_input_gets_to_require_a_gradient(learned):
    with fastgan.enabled(always=True):
        run("a_wrapper_that_makes_its_input_require_a_gradient")
    (unit,) = learned[0].units
    assert unit.name == "Discriminator"
    assert unit.work[True] < unit.work[False]


def test_the_layers_between_a_style_and_its_image_are_rerouted(learned):
    with fastgan.enabled(always=True):
        run("path_length")
    assert {unit.name for unit in learned[0].units} == {"Linear", "ConvTranspose2d"}


def test_each_of_two_discriminators_is_learned(learned, capsys):
    with fastgan.enabled(always=True):
        run("two_discriminators_of_one_loop")
    first, second = learned[0].units
    assert first.module is not second.module
    assert first.steps == STEPS - 1
    assert second.steps == 0
    assert "Discriminator: in the steps of" in capsys.readouterr().err


def test_pickles_copies_and_classes_of_a_rerouted_module_stay_clean(learned):
    d, g = models()
    with fastgan.enabled(always=True):
        for _ in MAKERS["wgan_gp"](d, g, 4):
            pass
        assert d._forward_hooks
        assert type(d) is Discriminator
        data = pickle.dumps(nn.Sequential(d.first, nn.ReLU()))
        buffer = io.BytesIO()
        torch.save(d, buffer)
        assert b"fastgan" not in data + buffer.getvalue()
        assert not copy.deepcopy(d)._forward_hooks
    assert not d._forward_hooks


def test_an_error_in_the_model_passes_and_training_goes_on(learned):
    d, g = models()
    with fastgan.enabled(always=True):
        losses = [loss.item() for loss, _ in MAKERS["a_penalty_alone"](d, g, 4)]
        with pytest.raises(RuntimeError):
            penalty(d, torch.randn(4, 5, 8, 8, requires_grad=True))
        losses += [loss.item() for loss, _ in MAKERS["a_penalty_alone"](d, g, 4)]
    assert len(losses) == 8
    assert not function_modes()


def test_a_compiled_model_stays_compiled(learned):
    torch.manual_seed(1)
    d, g = models()
    compiled = torch.compile(d, backend="eager")

    def train():
        return [loss.item() for loss, _ in MAKERS["a_penalty_alone"](copy.deepcopy(compiled), g, 4)]

    torch.manual_seed(2)
    expected = train()
    torch.manual_seed(2)
    with fastgan.enabled(always=True):
        assert train() == pytest.approx(expected)
    assert not learned[0].units
    assert "compiled" in " ".join(learned[0].refused.values())


def normalized():
    sn = nn.utils.parametrizations.spectral_norm
    layers = sn(nn.Conv2d(3, 6, 3)), nn.ReLU(), MinibatchStdLayer(2), nn.Flatten(), sn(nn.Linear(7 * 36, 1))
    return nn.Sequential(*layers)


def test_layers_are_converted_on_request_after_the_first_batch(learned, capsys):
    def train():
        torch.manual_seed(1)
        d, g = normalized(), models()[1]
        return d, [loss.item() for loss, _ in MAKERS["wgan_gp"](d, g, 5)], torch.get_rng_state()

    plain, expected, state = train()
    with fastgan.enabled(always=True, convert=True):
        d, losses, after = train()
        assert type(d[2]) is not MinibatchStdLayer
    assert losses == pytest.approx(expected, rel=1e-3, abs=1e-4)
    assert torch.equal(state, after)
    assert type(d[2]) is MinibatchStdLayer  # as before, when the context has ended
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(d.state_dict()[name], value, rtol=1e-3, atol=1e-4)
    errors = capsys.readouterr().err
    assert learned[0].units[0].steps == 4
    assert "converted: Sequential: 2 x fused spectral norm, 1 x minibatch_stddev" in errors
    assert "not converted: Sequential: it has no layer that fastgan replaces" in errors  # the generator


def test_a_model_that_verify_finds_unequal_stays_as_it_is(learned, capsys, monkeypatch):
    unequal = Verification([Difference("gradient", 0.5, "0.weight", 1e-4)])
    monkeypatch.setattr(Report, "verify", lambda self, args: unequal)
    d = normalized()
    kinds = [type(module) for module in d.modules()]
    with fastgan.enabled(convert=True):
        d(data()[0])
        assert [type(module) for module in d.modules()] == kinds
    assert "not converted: Sequential: gradient differs by 5.0e-01 at 0.weight" in capsys.readouterr().err


def test_a_process_of_fastgan_run_has_the_operations_for_stylegans_code(monkeypatch):
    from fastgan.launcher import children

    called = []
    monkeypatch.setattr(fastgan, "patch_torch_utils", lambda: called.append(True))
    monkeypatch.setattr(children, "include", called.append)
    monkeypatch.setattr(session, "at_end", lambda *reports: called.append(reports[0]))
    try:
        session.begin_process(session.Settings(always=True))
        assert called[0] == session.Settings(always=True)
        assert called[-1] is True
        assert torch.autograd.grad is session.grad
    finally:
        session.end()


def test_a_lightning_module_trains_the_same(learned, tmp_path):
    lightning = pytest.importorskip("lightning", reason="needs lightning")

    class Gan(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(1)
            self.d = Discriminator()
            self.automatic_optimization = False
            self.losses = []

        def training_step(self, batch, number):
            loss = penalty(self.d, batch[0].requires_grad_()) + self.d(batch[0].detach()).mean()
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            self.losses.append(loss.item())

        def configure_optimizers(self):
            return torch.optim.SGD(self.d.parameters(), 1e-2)

    def train():
        images = torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(1))
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images), batch_size=4)
        quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
        gan = Gan()
        lightning.Trainer(max_epochs=1, accelerator="cpu", default_root_dir=tmp_path, **quiet).fit(gan, loader)
        return gan.losses

    expected = train()
    with fastgan.enabled(always=True):
        assert train() == pytest.approx(expected, rel=1e-4)
    assert [unit.name for unit in learned[0].units] == ["Discriminator"]


def test_a_step_of_accelerate_trains_the_same(learned):
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate")

    def train():
        accelerator = accelerate.Accelerator(cpu=True)
        torch.manual_seed(1)
        d, optimizer = accelerator.prepare(d := Discriminator(), torch.optim.SGD(d.parameters(), 1e-2))
        losses = []
        for _ in range(STEPS):
            loss = penalty(d, data()[0].requires_grad_())
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
            losses.append(loss.item())
        return losses

    expected = train()
    with fastgan.enabled(always=True):
        assert train() == pytest.approx(expected, rel=1e-4)
    assert [unit.name for unit in learned[0].units] == ["Discriminator"]


def test_FASTGAN_off_does_nothing(learned, monkeypatch):  # noqa: N802
    monkeypatch.setenv("FASTGAN", "off")
    with fastgan.enabled():
        assert torch.autograd.grad is session._grad
        run("wgan_gp", 3)
    assert not learned


def test_a_slower_way_is_not_kept():
    from fastgan.launcher.timing import LEAST_GAIN, PAIRS, Unit, Way, typical

    def decided(lean):
        unit = Unit(nn.Linear(1, 1), (), "here", Way.FASTER)
        ways = []
        for _ in range(2 + 2 * PAIRS + 1):
            step = unit.begin()
            ways.append(step.is_lean)
            step.first, step.last = 0.0, lean if step.is_lean else 1.0
            step.end()
        assert ways[:2] == [False, True]
        assert sum(ways[2:-1]) == PAIRS
        return ways[-1]

    assert typical([1.0, 9.0, 1.2, 30.0]) == pytest.approx(1.1)  # two steps were interrupted
    assert decided(0.7)
    assert not decided(1.5)
    assert not decided(1 / LEAST_GAIN + 0.001)


def test_a_penalty_that_begins_late_is_learned(learned, monkeypatch):
    monkeypatch.setattr(session, "PATIENCE", 3)
    with fastgan.enabled(always=True):
        run("nothing_to_gain", 6)
        assert not torch.nn.modules.module._global_forward_hooks
        run("a_penalty_alone", 6)
        assert not torch.nn.modules.module._global_forward_hooks
    (unit,) = learned[0].units
    assert unit.steps == 4  # after one that finds the hooks off, and one that is learned from


def test_zeros_and_none_are_restored_for_an_optimizer():
    from fastgan.launcher.gradients import Pattern

    zeros, none, values = (nn.Parameter(torch.ones(2)) for _ in range(3))
    optimizer = torch.optim.SGD([zeros, none, values], 0.1)
    zeros.grad, values.grad = torch.zeros(2), torch.ones(2)
    pattern = Pattern()
    pattern.note(optimizer)
    zeros.grad, none.grad, values.grad = None, torch.zeros(2), None
    assert pattern.restore(optimizer) == 2
    assert not zeros.grad.any()
    assert none.grad is None
    assert values.grad is None  # a layer that this step has left out
