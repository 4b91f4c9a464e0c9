"""The launcher in scripts of each kind: the same losses, and the same gradients of None or zeros."""

from __future__ import annotations

import copy
import io
import os
import pickle

import pytest
import torch
from torch import nn
from torch.nn.modules import module as of_torch

import fastgan
from fastgan.launcher import session
from fastgan.launcher.learning import SCRIPTED
from fastgan.launcher.roots import GlobalHooks
from fastgan.torch_private import function_modes
from tests.launcher.training import MAKERS, STEPS, Discriminator, data, models, penalty

GLOBAL = (  # what PyTorch keeps about hooks of all modules
    of_torch._global_forward_pre_hooks,
    of_torch._global_forward_hooks,
    of_torch._global_forward_hooks_with_kwargs,
    of_torch._global_forward_hooks_always_called,
)


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


# Timed, a step is one of PyTorch's or of fastgan's.
TIMED = MAKERS if os.environ.get("FASTGAN_TESTS") == "all" else ("wgan_gp", "r1_by_backward", "path_length", "hvp")


@pytest.mark.parametrize(("name", "always"), [*((name, True) for name in MAKERS), *((name, False) for name in TIMED)])
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


@pytest.mark.parametrize(
    ("name", "module"), [("r1_at_named_images", "Conditional"), ("r1_at_images_in_an_object", "OfObjects")]
)
def test_a_module_is_rerouted_as_a_whole_however_it_gets_its_images(name, module, learned):
    with fastgan.enabled(always=True):
        run(name)
    (unit,) = learned[0].units
    assert unit.name == module
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


@pytest.mark.parametrize("compiled", [torch.jit.script, lambda d: torch.jit.trace(d, torch.randn(4, 3, 8, 8))])
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_model_of_torch_jit_runs_as_it_is(compiled, learned):
    def train():
        torch.manual_seed(1)
        return [
            loss.item() for loss, _ in MAKERS["a_penalty_alone"](compiled(nn.Sequential(nn.Conv2d(3, 1, 8))), None, 4)
        ]

    expected = train()
    with fastgan.enabled(always=True):
        assert train() == expected
    assert not learned[0].units
    assert set(learned[0].refused.values()) == {SCRIPTED}


def test_a_loss_whose_gradient_is_taken_without_backward_is_timed(learned):
    torch.manual_seed(1)
    d, _ = models()
    with fastgan.enabled():
        for _ in range(20):
            loss = penalty(d, data()[0].requires_grad_())
            torch.autograd.grad(loss, [d.first.weight, d.second.weight])
    (unit,) = learned[0].units
    assert unit.kept is not None
    assert unit.work[True] < unit.work[False]


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


def test_a_penalty_that_begins_late_is_learned(learned, monkeypatch):
    monkeypatch.setattr(session, "PATIENCE", 3)
    with fastgan.enabled(always=True):
        run("nothing_to_gain", 6)
        assert not torch.nn.modules.module._global_forward_hooks
        run("a_penalty_alone", 6)
        assert not torch.nn.modules.module._global_forward_hooks
    (unit,) = learned[0].units
    assert unit.steps == 4  # one step finds the hooks removed, and one is observed


def test_zeros_and_none_are_restored_for_an_optimizer():
    from fastgan.launcher.gradients import Pattern

    zeros, none, values, skipped = parameters = [nn.Parameter(torch.ones(2)) for _ in range(4)]
    used = {id(parameter) for parameter in parameters}
    optimizer = torch.optim.SGD(parameters, 0.1)
    zeros.grad, values.grad, skipped.grad = torch.zeros(2), torch.ones(2), torch.zeros(2)
    pattern = Pattern()
    assert pattern.is_empty
    pattern.note(optimizer, used)
    assert pattern.knows(optimizer)
    zeros.grad, none.grad, values.grad, skipped.grad = None, torch.zeros(2), None, None
    assert pattern.restore(optimizer, used - {id(skipped)}) == 2
    assert not zeros.grad.any()
    assert none.grad is None
    assert values.grad is None  # this step does not use the layer
    assert skipped.grad is None


def test_hooks_that_are_turned_off_leave_nothing():
    hooks = GlobalHooks()
    before = [len(of_all) for of_all in GLOBAL]
    hooks.turn_on()
    assert hooks.are_on
    assert [len(of_all) for of_all in GLOBAL] != before
    hooks.turn_off()
    assert not hooks.are_on
    assert [len(of_all) for of_all in GLOBAL] == before
