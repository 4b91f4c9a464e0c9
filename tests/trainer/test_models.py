from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch

import fastgan
from fastgan.trainer.config import PRESETS, ModelConfig, TrainConfig
from fastgan.trainer.data.size import sides
from fastgan.trainer.data.sources import Images
from fastgan.trainer.gan import GAN, packed
from fastgan.trainer.models import build_models, sagan
from fastgan.trainer.models.layers import Shape

CPU = torch.device("cpu")
SHAPES = ((2, 64), (3, 32, 32), (1, 8, 8, 8), (4, 16, 48), (1, 40, 24), (3, 48, 48))
IMAGE_NETWORKS = ["dcgan", "resnet", "residual", "sagan"]


def config(architecture: str, **changes: Any) -> ModelConfig:
    spectral_norm = "none" if architecture == "residual" else "fused"
    given = {"architecture": architecture, "spectral_norm": spectral_norm, "width": 4, "latent_dim": 6}
    return ModelConfig(**{**given, **changes})


@pytest.mark.parametrize("pack", [1, 2])
@pytest.mark.parametrize(
    ("architecture", "shape"),
    [
        *((name, shape) for name in IMAGE_NETWORKS for shape in SHAPES),
        *(("mlp", (2,)), ("pacgan", (2,)), ("auto", (3,)), ("auto", (1, 16))),
    ],
)
def test_networks_fit_each_other_and_every_parameter_gets_a_gradient(architecture, shape, pack):
    generator, discriminator = build_models(shape, 1.0, config(architecture, pack=pack))
    samples = generator(torch.randn(6, 6))
    assert samples.shape == (6, *shape)
    logits = discriminator(packed(samples, pack))
    assert logits.shape == (6 // pack, 1)
    (logits.square().sum() + samples.square().sum()).backward()
    assert all(p.grad is not None for network in (generator, discriminator) for p in network.parameters())


@pytest.mark.parametrize("size", [32, 128, 1024])
@pytest.mark.parametrize("architecture", IMAGE_NETWORKS)
def test_networks_reach_from_32_to_1024_pixels(architecture, size):
    shape = (3, size, size)
    networks = build_models(shape, 1.0, config(architecture, spectral_norm="none"))
    generator, discriminator = (network.eval() for network in networks)
    with torch.no_grad():
        samples = generator(torch.randn(1, 6))
        assert samples.shape == (1, *shape)
        assert discriminator(samples).shape == (1, 1)


@pytest.mark.parametrize("shape", [(3, 50, 50), (3, 32, 60), (3, 4, 4), (1, 2048), (1, 8, 8, 8, 8)])
def test_other_shapes_are_refused_by_name(shape):
    with pytest.raises(ValueError, match="no model supports samples of shape"):
        build_models(shape, 1.0, config("dcgan"))


@pytest.mark.parametrize(
    ("shape", "says"),
    [
        ((3, 100, 100), "multiple of 16, because the networks halve it 4 times; the next sizes that work: 96 and 112"),
        ((3, 64, 100), "the next sizes that work: 64x96 and 64x112"),
        ((3, 33, 64), "the next sizes that work: 32x64 and 40x64"),
    ],
)
def test_the_next_sizes_that_work_are_named_and_do_work(shape, says):
    with pytest.raises(ValueError, match=says):
        build_models(shape, 1.0, config("dcgan"))
    for size in says.rpartition(": ")[2].split(" and "):
        assert build_models((3, *sides(size)), 1.0, config("dcgan"))


@pytest.mark.parametrize(("architecture", "shape"), [("pacgan", (1, 32, 32)), ("resnet", (2,))])
def test_a_network_for_other_data_is_refused(architecture, shape):
    with pytest.raises(ValueError, match=f"architecture {architecture} makes"):
        build_models(shape, 1.0, config(architecture))


@pytest.mark.parametrize("architecture", [*IMAGE_NETWORKS, "mlp", "pacgan"])
def test_labels_change_both_players_answers(architecture):
    shape = (2,) if architecture in ("mlp", "pacgan") else (1, 16, 16)
    torch.manual_seed(0)
    generator, discriminator = build_models(shape, 1.0, config(architecture), classes=3)
    generator.eval(), discriminator.eval()
    z, x = torch.randn(4, 6), torch.randn(4, *shape)
    zeros, ones = torch.zeros(4, dtype=torch.long), torch.ones(4, dtype=torch.long)
    assert (generator(z, zeros) - generator(z, ones)).abs().max() > 1e-4
    assert (discriminator(x, zeros) - discriminator(x, ones)).abs().max() > 1e-4


def test_the_discriminators_without_norms_take_the_one_pass():
    x = torch.randn(4, 1, 16, 16)
    for architecture in ("dcgan", "resnet", "residual"):
        _, discriminator = build_models((1, 16, 16), 1.0, config(architecture))
        assert fastgan.explain_penalty(discriminator, x) == "one pass"
    _, discriminator = build_models((2,), 1.0, config("pacgan"))
    assert fastgan.explain_penalty(discriminator, torch.randn(4, 2)) == "one pass"  # maxout is piecewise affine


def test_a_residual_network_starts_as_a_shallow_one():
    _, discriminator = build_models((1, 16, 16), 1.0, config("residual"))
    x = torch.randn(2, 1, 16, 16)
    blocks = [m for m in discriminator.modules() if type(m).__name__ == "Block"]
    assert len(blocks) == 6
    h = torch.randn(2, blocks[0].residual[0].in_channels, 4, 4)
    assert torch.equal(blocks[0](h), h)
    assert discriminator(x).isfinite().all()


@pytest.mark.parametrize(
    ("shape", "side"), [((1, 8, 8), 4), ((3, 32, 32), 16), ((3, 64, 64), 32), ((3, 256, 256), 32), ((1, 1024), 512)]
)
def test_attention_is_at_the_largest_side_of_at_most_1024_positions(shape, side):
    networks = build_models(shape, 1.0, config("sagan"))
    sides = []
    for network in networks:
        (layer,) = (module for module in network.modules() if isinstance(module, sagan.SelfAttention))
        layer.register_forward_pre_hook(lambda module, inputs: sides.append(inputs[0].shape[-1]))
    generator, discriminator = networks
    discriminator(generator.eval()(torch.randn(1, 6)))
    assert sides == [side, side]


@pytest.mark.parametrize(
    ("shape", "attended"),
    [((3, 64, 64), (32, 32)), ((3, 64, 192), (16, 48)), ((3, 48, 48), (24, 24)), ((1, 1024, 8), (512, 4))],
)
def test_attention_counts_the_positions_of_pictures_that_are_not_square(shape, attended):
    found = Shape.of(shape)
    assert found.sides_at(sagan.attended_size(found)) == attended


def test_attention_is_softmax_of_products_times_a_factor_that_starts_at_zero():
    torch.manual_seed(0)
    layer = sagan.SelfAttention(Shape(1, 8, 2), 16).double()
    x = torch.randn(2, 16, 4, 4, dtype=torch.float64)
    assert torch.equal(layer(x), x)
    with torch.no_grad():
        layer.factor.fill_(0.7)
    query, key, value = (conv.weight.flatten(1) @ x.flatten(2) for conv in (layer.query, layer.key, layer.value))
    attention = (query.mT @ key / 2**0.5).softmax(-1)  # (N, of a query, of a key), with queries of 2 channels
    expected = layer.out.weight.flatten(1) @ (value @ attention.mT)
    assert torch.allclose(layer(x), x + 0.7 * expected.view_as(x), rtol=1e-12)


@pytest.mark.parametrize("kernels", ["fastgan", "torch"])
@pytest.mark.parametrize("penalty", ["r1", "r1+r2", "wgan-gp", "r1-finite-difference"])
def test_attention_trains_with_a_penalty(penalty, kernels):
    images = torch.randint(0, 256, (40, 1, 16, 16), dtype=torch.uint8)
    optim = dataclasses.replace(
        PRESETS["fashion-mnist"][1].optim, batch_size=8, penalty=penalty, kernels=kernels, d_lr=0.1
    )
    spectral_norm = "fused" if kernels == "fastgan" else "torch"
    game = GAN(config("sagan", spectral_norm=spectral_norm), optim, Images(images, 0, CPU), 0, CPU)
    (layer,) = (module for module in game.discriminator.modules() if isinstance(module, sagan.SelfAttention))
    query = next(layer.query.parameters())
    before = query.detach().clone()
    for _ in range(3):
        assert game.step().isfinite().all()
    assert layer.factor != 0
    assert not torch.equal(query, before)


def test_a_pack_joins_neighbors_along_the_channels():
    x = torch.arange(24.0).view(4, 2, 3)
    assert torch.equal(packed(x, 2), torch.stack([torch.cat([x[0], x[1]]), torch.cat([x[2], x[3]])]))
    assert packed(x, 1) is x


def test_a_packed_or_conditional_game_plays_and_goes_on_from_its_state():
    images = torch.randint(0, 256, (40, 1, 16, 16), dtype=torch.uint8)
    labels = torch.arange(40) % 3
    optim = dataclasses.replace(PRESETS["fashion-mnist"][1].optim, batch_size=8)
    for model in (config("dcgan", pack=2), config("dcgan", conditional=True)):
        for penalty in ("none", "r1+r2"):
            kind = dataclasses.replace(optim, penalty=penalty)
            games = [GAN(model, kind, Images(images, 0, CPU, labels), 0, CPU) for _ in range(2)]
            games[0].step()
            games[1].load_state_dict(copy.deepcopy(games[0].state_dict()))
            assert torch.equal(games[0].step(), games[1].step())
            assert games[0].samples(torch.randn(5, 6)).shape == (5, 1, 16, 16)


def test_conditional_data_without_labels_is_refused():
    images = Images(torch.zeros(8, 1, 16, 16, dtype=torch.uint8), 0, CPU)
    with pytest.raises(ValueError, match="no labels"):
        GAN(config("dcgan", conditional=True), PRESETS["fashion-mnist"][1].optim, images, 0, CPU)


def test_settings_that_contradict_each_other_are_refused():
    with pytest.raises(ValueError, match="conditional and pack"):
        ModelConfig(conditional=True, pack=2)
    with pytest.raises(ValueError, match="residual starts layers at zero"):
        ModelConfig(architecture="residual")
    with pytest.raises(ValueError, match=r"multiple of pack \* accumulate, 3"):
        TrainConfig(model=ModelConfig(pack=3))
