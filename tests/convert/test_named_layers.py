"""Layers of other code bases: replaced where fastgan's are equal, in training, evaluation and a penalty."""

from __future__ import annotations

import copy
import pickle
import random

import pytest
import torch
from torch import nn

import fastgan
from tests.convert.named_stand_ins import (
    ConvOfAProject,
    Head,
    MimicryConv,
    MinibatchDiscrimination1d,
    MinibatchStdLayer,
    SNConv2d,
    SNEmbedding,
    SNLinear,
    SpectralNorm2d,
    StddevLayer,
)
from tests.harness import assert_close

IMAGES = torch.randn(8, 3, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
ROWS = IMAGES[:, :, 0].flatten(1)  # (8, 15)
LAYERS = {
    "BigGAN's convolution": (lambda: SNConv2d(3, 5, 3), IMAGES, "fused spectral norm"),
    "BigGAN's convolution, 3 iterations": (
        lambda: SNConv2d(3, 5, 3, num_itrs=3, eps=1e-6),
        IMAGES,
        "fused spectral norm",
    ),
    "BigGAN's linear layer": (lambda: SNLinear(15, 4), ROWS, "fused spectral norm"),
    "BigGAN's embedding": (lambda: SNEmbedding(6, 4), torch.arange(6), "fused spectral norm"),
    "mimicry's convolution": (lambda: MimicryConv(3, 5, 3, num_iters=2), IMAGES, "fused spectral norm"),
    "mimicry's, in a subclass": (lambda: ConvOfAProject(3, 5, 3), IMAGES, "fused spectral norm"),
    "torchgan's minibatch discrimination": (
        lambda: MinibatchDiscrimination1d(15, 4, 3),
        ROWS,
        "minibatch_discrimination",
    ),
    "StyleGAN2-ADA's stddev": (lambda: MinibatchStdLayer(4), IMAGES, "minibatch_stddev"),
    "StyleGAN2-ADA's stddev of the batch": (lambda: MinibatchStdLayer(None, 3), IMAGES, "minibatch_stddev"),
    "StddevLayer": (lambda: StddevLayer(num_new_features=3), IMAGES, "minibatch_stddev"),
}


def trained(layer, x):
    """Two forwards before a backward with a penalty, as D(real) and D(fake), then evaluation and the state."""
    layer.zero_grad()
    if x.is_floating_point():
        x = x.clone().requires_grad_()
        outputs = [layer(x), layer(x + 1)]
        (grad,) = torch.autograd.grad(sum(y.square().sum() for y in outputs), x, create_graph=True)
        loss = grad.square().mean() + outputs[0].sum()
    else:
        loss = layer(x).square().sum() + layer(x).sum()
    if loss.requires_grad:
        loss.backward()
    found = [p.grad for p in layer.parameters()] + [loss.detach(), *layer.buffers()]
    with torch.no_grad():
        return [*found, layer.eval()(x), *(b.clone() for b in layer.buffers())]


@pytest.mark.parametrize("name", LAYERS)
def test_a_known_layer_is_replaced_and_trains_as_it_did(name):
    make, x, by = LAYERS[name]
    torch.manual_seed(0)
    layer = make().double()
    plain = copy.deepcopy(layer)
    (row,) = fastgan.convert(layer).replaced
    assert row.replaced_by == by, row.reason
    assert type(layer) is not type(plain)
    copied = pickle.loads(pickle.dumps(layer))
    wanted = trained(plain, x)
    for converted in (layer, copied):
        for actual, want in zip(trained(converted, x), wanted, strict=True):
            assert (actual is None) == (want is None)
            if want is not None:
                assert_close(actual, want.double(), order=1)


def test_torchgans_spectral_norm_is_mended_on_request_alone():
    torch.manual_seed(0)
    layer = SpectralNorm2d(nn.Conv2d(3, 5, 3), power_iterations=2).double()
    row = fastgan.convert(nn.Sequential(copy.deepcopy(layer))).rows[1]
    assert row.replaced_by is None
    assert "gradients are wrong after two forwards" in row.reason
    converted = copy.deepcopy(layer)
    (row,) = fastgan.convert(nn.Sequential(converted), mend=True).replaced
    assert row.replaced_by == "fused spectral norm"
    seen = []
    converted.module.register_forward_hook(lambda *_: seen.append(1))  # its forward does not run these
    assert_close(converted(IMAGES), layer(IMAGES), order=0)
    assert_close(converted.u, layer.u, order=0)
    assert not seen
    copy.deepcopy(converted)
    fastgan.revert(converted)
    assert type(converted) is SpectralNorm2d
    assert_close(converted(IMAGES), layer(IMAGES), order=0)


def test_what_is_not_equal_is_named_with_a_reason():
    transposed = fastgan.convert(SNLinear(15, 4, transpose=True)).rows[0]
    assert transposed.replaced_by is None
    assert "u0 has shape (1, 15), not (1, 4)" in transposed.reason
    assert fastgan.convert(SNConv2d(3, 5, 3, num_svs=2)).rows[0].reason == "estimates several singular values"
    inline = fastgan.convert(nn.Sequential(Head())).rows[1]
    assert inline.replaced_by is None
    assert "only whole layers are replaced" in inline.reason


class Coordinates(nn.Module):
    """Appends channels, which differ between positions; draws random numbers on the way."""

    def forward(self, x):
        random.random(), torch.rand(1)
        return torch.cat([x, torch.linspace(-1, 1, x.shape[3]).expand_as(x[:, :1])], 1)


class Renamed(MinibatchStdLayer):
    pass


def test_a_statistic_is_found_by_what_it_does_and_random_numbers_stay():
    layer = nn.Sequential(Coordinates(), Renamed(4), nn.ReLU())
    states = random.getstate(), torch.get_rng_state()
    rows = {row.module: row for row in fastgan.convert(layer).rows}
    assert rows["Renamed"].replaced_by == "minibatch_stddev"
    assert rows["Coordinates"].replaced_by is None
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
