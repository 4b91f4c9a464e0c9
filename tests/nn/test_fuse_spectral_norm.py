"""Models whose normalized weights are computed in one call per forward."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, remove_spectral_norm
from torch.nn.utils import spectral_norm as torch_hook
from torch.utils.checkpoint import checkpoint

from fastgan.nn import utils
from tests.harness import assert_close
from tests.nn.spectral_norm_problem import IMAGES, Double, assert_same, discriminator, step


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    "form", [utils.spectral_norm, parametrizations.spectral_norm, torch_hook], ids=["fastgan", "torch", "torch hook"]
)
def test_a_fused_model_trains_as_the_model_did(form, training):
    model = discriminator(form)
    with torch.no_grad():
        model(IMAGES)  # a hook's first u and v are random, and so is its first sigma: it may be about zero
    model.train(training)
    fused = utils.fuse_spectral_norm(copy.deepcopy(model))
    keys = list(model.state_dict())
    for _ in range(3):
        assert_same(fused, model, IMAGES)
    assert list(fused.state_dict()) == keys
    model.load_state_dict(fused.state_dict())
    assert_same(fused, model, IMAGES)


def test_a_fused_model_takes_one_call_a_forward(monkeypatch):
    from fastgan.ops.spectral_norm import native_kernels

    model = utils.fuse_spectral_norm(discriminator(utils.spectral_norm))
    calls = []
    original = native_kernels.Native.forward
    monkeypatch.setattr(
        native_kernels.Native, "forward", lambda self, *a: (calls.append(len(a[0])), original(self, *a))
    )
    model(IMAGES)
    assert calls == [3]


def test_weights_of_other_settings_are_computed_in_calls_of_their_own():
    mixed = nn.Sequential(
        utils.spectral_norm(nn.Linear(6, 5)),
        utils.spectral_norm(nn.Linear(5, 4), n_power_iterations=2),
        torch_hook(nn.Linear(4, 4), eps=1e-6),
        utils.spectral_norm(nn.Linear(4, 3)).eval(),
    )
    fused = utils.fuse_spectral_norm(copy.deepcopy(mixed))
    assert_same(fused, mixed, torch.randn(2, 6))


def test_real_and_fake_before_one_backward_is_right_for_both():
    model = discriminator(parametrizations.spectral_norm)
    fused = utils.fuse_spectral_norm(copy.deepcopy(model))
    for net in (model, fused):
        (net(IMAGES).mean() - net(2 * IMAGES).mean()).backward()
    for a, b in zip(fused.parameters(), model.parameters(), strict=True):
        assert_close(a.grad, b.grad.double(), order=1)


def test_eval_then_train_in_the_hook_form_does_not_disturb_backward():
    fused = utils.fuse_spectral_norm(discriminator(torch_hook))
    fused.eval()
    output = fused(IMAGES)
    fused.train()
    fused(IMAGES)
    output.sum().backward()
    assert all(p.grad.isfinite().all() for p in fused.parameters())


@pytest.mark.parametrize("form", [utils.spectral_norm, torch_hook], ids=["parametrization", "hook"])
def test_parameter_gradients_through_a_penalty_equal_pytorchs(form):
    model = discriminator(parametrizations.spectral_norm if form is utils.spectral_norm else torch_hook)
    fused = utils.fuse_spectral_norm(copy.deepcopy(model))
    for net in (model, fused):
        x = IMAGES.clone().requires_grad_()
        (grad,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
        (grad.flatten(1).norm(dim=1) - 1).square().mean().backward()
    for a, b in zip(fused.parameters(), model.parameters(), strict=True):
        if b.grad is not None and b.grad.any():
            assert_close(a.grad, b.grad.double(), order=2)


def test_a_sub_module_called_by_itself_normalizes_its_own_weight():
    model = discriminator(parametrizations.spectral_norm)
    fused = utils.fuse_spectral_norm(copy.deepcopy(model))
    assert_same(fused[0], model[0], IMAGES)
    assert_same(fused, model, IMAGES)


def test_an_error_in_the_forward_leaves_nothing_behind():
    model = discriminator(parametrizations.spectral_norm)
    fused = utils.fuse_spectral_norm(copy.deepcopy(model))
    for net in (model, fused):
        with pytest.raises(RuntimeError):
            net(torch.randn(1, 3, 9, 9))
    assert not any(key.startswith("_normalized") for key in vars(fused[0]))
    assert_same(copy.deepcopy(fused), model, IMAGES)


@pytest.mark.parametrize("form", [torch_hook, parametrizations.spectral_norm])
def test_a_part_that_was_fused_before_the_whole_iterates_once(form):
    model = nn.Sequential(discriminator(form)[:3], *discriminator(form)[3:])
    fused = copy.deepcopy(model)
    utils.fuse_spectral_norm(fused[0])
    assert_same(utils.fuse_spectral_norm(fused), model, IMAGES)
    assert_same(fused[0], model[0], IMAGES)


def test_fusing_twice_computes_once():
    model = discriminator(utils.spectral_norm)
    fused = utils.fuse_spectral_norm(utils.fuse_spectral_norm(copy.deepcopy(model)))
    assert len(fused._forward_pre_hooks) == 1
    assert_same(fused, model, IMAGES)


@pytest.mark.parametrize("form", [utils.spectral_norm, torch_hook], ids=["parametrization", "hook"])
@pytest.mark.parametrize("part", ["whole", "layers", "nested"])
def test_a_recomputed_forward_keeps_u_and_v(part, form):
    def layers(run):
        def forward(x):
            for layer in run:
                x = checkpoint(layer, x, use_reentrant=False)
            return x

        return forward

    plain = discriminator(form)
    with torch.no_grad():
        plain(IMAGES)
    fused = utils.fuse_spectral_norm(copy.deepcopy(plain))
    calls = []
    if part != "whole":
        fused.forward = layers(list(fused))  # type: ignore[method-assign]
    for module in fused.modules():
        module.register_forward_pre_hook(lambda module, inputs: calls.append(module))
    x = IMAGES.clone().requires_grad_()
    output = fused(x) if part == "layers" else checkpoint(fused, x, use_reentrant=False)
    forward_calls = len(calls)
    output.square().sum().backward()
    assert len(calls) > forward_calls, "nothing was run again"
    actual = [*(p.grad for p in fused.parameters()), *fused.buffers()]
    for a, b in zip(actual, step(plain, IMAGES)[1:], strict=True):
        assert_close(a, b.double(), order=1)


@pytest.mark.parametrize("form", [utils.spectral_norm, torch_hook], ids=["parametrization", "hook"])
def test_a_forward_in_another_thread_does_not_disturb_this_one(form):
    model = nn.Sequential(form(nn.Linear(3, 4)), nn.Identity(), form(nn.Linear(4, 2))).eval()
    fused = utils.fuse_spectral_norm(model)
    x = torch.ones(2, 3)
    fused(x).sum().backward()
    expected = [p.grad.clone() for p in fused.parameters()]
    fused.zero_grad()
    half_way, finished = threading.Event(), threading.Event()

    def preview():
        with torch.no_grad():
            fused(x)

    other = threading.Thread(target=preview)

    def in_the_middle(*_):
        if threading.current_thread() is other:
            half_way.set()
            finished.wait(60)
        else:
            other.start()
            assert half_way.wait(60)

    fused[1].register_forward_pre_hook(in_the_middle)
    fused(x).sum().backward()
    finished.set()
    other.join()
    for parameter, wanted in zip(fused.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, wanted)


@pytest.mark.parametrize("form", [utils.spectral_norm, torch_hook], ids=["parametrization", "hook"])
def test_a_replica_of_a_fused_model_normalizes_its_own_weights(form):
    """As torch.nn.DataParallel makes them: copies whose parameters have a path back to the model's."""
    plain = nn.Sequential(form(nn.Linear(3, 4)), form(nn.Linear(4, 2))).eval()
    fused = utils.fuse_spectral_norm(copy.deepcopy(plain))

    def replica(module):
        copied = module._replicate_for_data_parallel()
        for name, child in module._modules.items():
            copied._modules[name] = replica(child)
        for name, parameter in module._parameters.items():
            setattr(copied, name, parameter * 1)
        return copied

    for model in (plain, fused):
        replica(model)(torch.ones(2, 3)).square().sum().backward()
    for actual, expected in zip(fused.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad)


def test_a_parametrization_added_after_fusing_counts():
    model = discriminator(parametrizations.spectral_norm)
    fused = utils.fuse_spectral_norm(copy.deepcopy(model))
    for net in (model, fused):
        parametrize.register_parametrization(net[0], "weight", Double())
        net.zero_grad()
    assert_same(fused, model, IMAGES)


def test_a_weight_changed_in_the_forward_is_normalized_as_it_is_then():
    class Clamped(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = parametrizations.spectral_norm(nn.Linear(4, 2))

        def forward(self, x):
            with torch.no_grad():
                self.layer.parametrizations.weight.original.clamp_(-0.1, 0.1)
            return self.layer(x)

    model = Clamped().eval()
    fused = utils.fuse_spectral_norm(copy.deepcopy(model))
    assert_same(fused, model, torch.randn(3, 4))


def test_a_forward_that_was_interrupted_leaves_nothing_that_stays():
    class Interrupted(nn.Module):
        def forward(self, x):
            raise KeyboardInterrupt

    fused = utils.fuse_spectral_norm(nn.Sequential(utils.spectral_norm(nn.Linear(3, 3)), Interrupted()))
    with pytest.raises(KeyboardInterrupt):
        fused(torch.ones(1, 3))
    copied = pickle.loads(pickle.dumps(copy.deepcopy(fused[0])))
    for layer in (fused[0], copied):
        with torch.no_grad():
            layer.parametrizations.weight.original.copy_(2 * torch.eye(3))
        layer.eval()
        torch.testing.assert_close(
            layer.weight, torch.eye(3) / layer.parametrizations.weight[0]._u.dot(layer.parametrizations.weight[0]._v)
        )


def test_a_weight_with_a_second_parametrization_is_left_to_itself():
    model = discriminator(utils.spectral_norm)
    parametrize.register_parametrization(model[0], "weight", Double())
    fused = utils.fuse_spectral_norm(copy.deepcopy(model))
    assert_same(fused, model, IMAGES)


def test_what_cannot_be_fused_is_refused():
    with pytest.raises(ValueError, match="Sequential has no spectrally normalized weight"):
        utils.fuse_spectral_norm(nn.Sequential(nn.Linear(3, 2)))
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got Parameter"):
        utils.fuse_spectral_norm(nn.Parameter(torch.ones(2)))


@pytest.mark.parametrize("form", [torch_hook, parametrizations.spectral_norm, utils.spectral_norm])
def test_a_norm_removed_from_a_fused_model_is_gone(form):
    fused = utils.fuse_spectral_norm(discriminator(form))
    fused(IMAGES)
    model, module = fused.eval(), fused[0]
    expected, weight = model(IMAGES), module.weight.clone()
    if form is torch_hook:
        remove_spectral_norm(module)
    else:
        parametrize.remove_parametrizations(module, "weight")
    assert_close(module.weight, weight.double(), order=0)
    assert_close(model(IMAGES), expected.double(), order=0)
    with torch.no_grad():
        module.weight.neg_()
    form(module)
    assert_close(model(IMAGES), nn.Sequential(*model)(IMAGES).double(), order=0)


def test_a_removed_norm_is_not_iterated():
    fused = utils.fuse_spectral_norm(discriminator(utils.spectral_norm))
    fused(IMAGES)
    norm = fused[0].parametrizations.weight[0]
    parametrize.remove_parametrizations(fused[0], "weight")
    u = norm._u.clone()
    fused(IMAGES)
    assert torch.equal(norm._u, u)
