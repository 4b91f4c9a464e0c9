from __future__ import annotations

import copy
import io
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

MODULES = {
    "linear": (lambda: nn.Linear(5, 7), (3, 5)),
    "conv1d": (lambda: nn.Conv1d(3, 4, 3), (2, 3, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), (2, 2, 4, 4, 4)),
    "conv_transpose1d": (lambda: nn.ConvTranspose1d(3, 4, 3), (2, 3, 9)),
    "conv_transpose2d": (lambda: nn.ConvTranspose2d(3, 5, 4, stride=2), (2, 3, 5, 5)),
    "conv_transpose3d": (lambda: nn.ConvTranspose3d(2, 3, 2), (2, 2, 3, 3, 3)),
    "embedding": (lambda: nn.Embedding(11, 4), None),
}


class Double(nn.Module):
    def forward(self, weight):
        return 2 * weight


def inputs_of(shape):
    return torch.randn(shape) if shape else torch.randint(0, 11, (6,))


def pair(make, **options):
    """The same module normalized by PyTorch and by fastgan, from the same state."""
    theirs = parametrizations.spectral_norm(make(), **options)
    ours = utils.spectral_norm(make(), **options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def step(model, x):
    """Output, gradients and state after one training step."""
    model.zero_grad()
    output = model(x)
    output.square().sum().backward()
    return [output, *(p.grad for p in model.parameters()), *(b.clone() for b in model.buffers())]


def assert_same(model, other, x, *, order=1):
    for a, b in zip(step(model, x), step(other, x), strict=True):
        assert_close(a, b.double(), order=order)


def discriminator(normalize):
    return nn.Sequential(
        normalize(nn.Conv2d(3, 8, 3, padding=1)),
        nn.LeakyReLU(0.2),
        normalize(nn.ConvTranspose2d(8, 4, 4, stride=2)),
        nn.LeakyReLU(0.2),
        nn.Flatten(),
        normalize(nn.Linear(4 * 18 * 18, 1)),
    )


IMAGES = torch.randn(4, 3, 8, 8)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize(("make", "shape"), MODULES.values(), ids=MODULES)
def test_modules_train_as_under_pytorch(make, shape, n, training):
    theirs, ours = (m.train(training) for m in pair(make, n_power_iterations=n))
    x = inputs_of(shape)
    for _ in range(3):
        assert_same(ours, theirs, x)


@pytest.mark.parametrize("dim", [None, 0, 1, -1])
def test_dim_means_what_it_means_in_pytorch(dim):
    theirs, ours = pair(lambda: nn.Conv2d(3, 5, 2), dim=dim)
    assert_same(ours, theirs, torch.randn(2, 3, 4, 4))


def test_the_state_dict_has_the_keys_of_pytorch_and_loads_both_ways():
    theirs, ours = pair(lambda: nn.Conv2d(3, 5, 2))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert "parametrizations.weight.0._u" in ours.state_dict()
    ours(torch.randn(1, 3, 4, 4))
    theirs.load_state_dict(ours.state_dict())
    assert_same(ours, theirs, torch.randn(2, 3, 4, 4))


def test_a_new_module_starts_from_the_same_numbers_as_under_pytorch():
    states = []
    for normalize in (utils.spectral_norm, parametrizations.spectral_norm):
        torch.manual_seed(5)
        states.append(normalize(nn.Linear(9, 4)).state_dict())
    for a, b in zip(*(s.values() for s in states), strict=True):
        assert_close(a, b.double(), order=0)


def test_a_weight_of_one_dimension_is_divided_by_its_norm():
    theirs, ours = pair(lambda: nn.BatchNorm2d(4))
    ours.weight.square().sum()
    assert_close(ours.weight, theirs.weight.double(), order=0)
    assert list(ours.state_dict()) == list(theirs.state_dict())


@pytest.mark.parametrize(
    ("options", "error"),
    [(dict(name="wait"), ValueError), (dict(n_power_iterations=0), ValueError), (dict(dim=4), IndexError)],
)
def test_bad_arguments_raise_what_pytorch_raises(options, error):
    messages = []
    for normalize in (utils.spectral_norm, parametrizations.spectral_norm):
        with pytest.raises(error) as raised:
            normalize(nn.Conv2d(3, 5, 2), **options)
        messages.append(str(raised.value))
    assert messages[0] == messages[1]


def test_remove_parametrizations_leaves_the_normalized_weight():
    theirs, ours = (m.eval() for m in pair(lambda: nn.Linear(4, 3)))
    for module in (theirs, ours):
        parametrize.remove_parametrizations(module, "weight")
    assert type(ours) is nn.Linear
    assert_close(ours.weight, theirs.weight.double(), order=0)


@pytest.mark.parametrize(
    ("form", "fuse"),
    [(utils.spectral_norm, False), (utils.spectral_norm, True), (torch_hook, True)],
    ids=["each", "fused", "fused hooks"],
)
@pytest.mark.parametrize("moment", ["new", "after forward", "after backward", "after eval"])
def test_models_can_be_copied_and_pickled_at_any_time(moment, form, fuse):
    model = discriminator(form)
    if fuse:
        utils.fuse_spectral_norm(model)
    output = None
    if moment != "new":
        output = model(IMAGES)
    if moment == "after backward":
        output.sum().backward()
    if moment == "after eval":
        model.eval()(IMAGES)
        model.train()
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(saved, weights_only=False)]
    expected = step(copy.deepcopy(model), IMAGES)
    for other in copies:
        assert list(other.state_dict()) == list(model.state_dict())
        for a, b in zip(step(other, IMAGES), expected, strict=True):
            assert torch.equal(a, b)


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
    for ours, theirs in zip(fused.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_modules_of_another_dtype_work(dtype):
    linear = utils.spectral_norm(nn.Linear(6, 4))
    expected = copy.deepcopy(linear).double()(torch.ones(1, 6, dtype=torch.float64))
    actual = linear.to(dtype)(torch.ones(1, 6, dtype=dtype))
    assert actual.dtype == dtype
    error = 8 * torch.finfo(dtype).eps  # six products and a sum, each rounded
    torch.testing.assert_close(actual.double(), expected, rtol=error, atol=error)


def test_autocast_multiplies_in_half_precision_and_normalizes_in_single():
    linear = utils.spectral_norm(nn.Linear(64, 8))
    with torch.autocast("cpu", torch.bfloat16):
        output = linear(torch.randn(2, 64))
        assert linear.weight.dtype == torch.float32
    assert output.dtype == torch.bfloat16


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


def test_a_checkpoint_of_either_form_loads_into_the_other():
    hook, new = discriminator(torch_hook), discriminator(parametrizations.spectral_norm)
    for _ in range(20):  # both orders of iteration settle on one u and v
        hook(IMAGES)
    new.load_state_dict(utils.convert_spectral_norm_state_dict(hook.state_dict(), "parametrization"))
    assert_close(new.eval()(IMAGES), hook.eval()(IMAGES).double(), order=0)
    new.train()(IMAGES)
    hook.load_state_dict(utils.convert_spectral_norm_state_dict(new.state_dict(), "hook"))
    assert_close(new.eval()(IMAGES), hook.eval()(IMAGES).double(), order=0)


@pytest.mark.parametrize("form", ["parametrization", "hook"])
def test_converting_there_and_back_is_the_identity(form):
    model = discriminator(torch_hook if form == "hook" else parametrizations.spectral_norm)
    state = model.state_dict()
    there = utils.convert_spectral_norm_state_dict(state, "hook" if form == "parametrization" else "parametrization")
    back = utils.convert_spectral_norm_state_dict(there, form)
    assert list(back) == list(state)
    assert not set(there) & {k for k in state if "bias" not in k}
    assert back._metadata == state._metadata


def test_a_checkpoint_that_lacks_a_vector_is_refused_by_name():
    state = discriminator(torch_hook).state_dict()
    del state["0.weight_v"]
    with pytest.raises(ValueError, match=r"0\.weight_orig but no 0\.weight_v"):
        utils.convert_spectral_norm_state_dict(state, "parametrization")
    with pytest.raises(ValueError, match="form must be"):
        utils.convert_spectral_norm_state_dict(state, "old")


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
