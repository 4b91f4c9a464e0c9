"""Timed training steps: both variants compute the same, with the work and memory that their table states."""

from __future__ import annotations

import copy
import dataclasses
from functools import partial

import pytest
import torch
from torch import nn

import fastgan
from fastgan.bench import discriminators, generators, measure
from fastgan.bench.case import BASELINE, COUNTS, prepare
from fastgan.bench.cases import CASES, SUITES
from fastgan.bench.flops import count_flops
from fastgan.bench.steps import OBJECTIVES, RELATIVISTIC, batches, d_step, g_step, seeded

CPU = torch.device("cpu")
SMALL = {
    "critic": (partial(discriminators.critic, (3, 8, 8), 16), (4, 3, 16, 16)),
    "layer norm": (partial(discriminators.layer_norm_critic, 4, 32), (2, 3, 32, 32)),
    "mlp": (partial(discriminators.mlp, 16), (8, 2)),
    "sngan": (partial(discriminators.SNGANResNet, 2), (2, 3, 32, 32)),
    "stylegan2": (partial(discriminators.StyleGAN2, 16, 4), (4, 3, 16, 16)),
    "stylegan2 without stddev": (partial(discriminators.StyleGAN2, 16, 4, stddev=False), (4, 3, 16, 16)),
    "r3gan": (partial(discriminators.R3GAN, 16, 8), (2, 3, 16, 16)),
}
AFFINE = ["critic", "mlp", "sngan", "stylegan2 without stddev", "r3gan"]


def variants(name, objective, dtype=torch.float32):
    make, shape = SMALL[name]
    case = dataclasses.replace(
        CASES["wgan-gp/critic64-batch4"],
        name=name,
        dtype=dtype,
        setup=lambda device, dtype: batches(make, shape, objective, device, dtype),
    )
    return prepare(case, CPU)


@pytest.mark.parametrize("objective", ["wgan-gp", "loss+r1", RELATIVISTIC])
@pytest.mark.parametrize("name", SMALL)
def test_fastgans_step_gives_the_gradients_of_pytorchs(name, objective):
    check(name, objective)


@pytest.mark.parametrize("objective", [name for name, objective in OBJECTIVES.items() if objective.whole])
@pytest.mark.parametrize("name", ["critic", "sngan", "stylegan2"])
def test_fastgans_whole_step_gives_the_gradients_of_pytorchs(name, objective):
    check(name, objective)


@pytest.mark.parametrize("parameter", ["bias", "weight"])
def test_a_wrong_gradient_of_any_parameter_is_refused(parameter):
    make, shape = SMALL["critic"]
    right = OBJECTIVES["loss+r1"]

    def fast(model, real, fake):
        wrong = [p for name, p in model.named_parameters() if name.endswith(parameter)][-1]
        return right.fast(model, real, fake) + (wrong - wrong.detach()).sum()  # of the same value

    def setup(device, dtype):
        batch = torch.randn(shape, device=device, dtype=dtype)
        return d_step(seeded(make, device, dtype), batch, -batch, dataclasses.replace(right, fast=fast))

    with pytest.raises(ArithmeticError, match="fastgan differs from torch by"):
        prepare(dataclasses.replace(CASES["loss+r1/critic64-batch4"], setup=setup), CPU)


@pytest.mark.parametrize("objective", ["wgan-gp", "loss+r1"])
def test_every_parameters_gradient_is_compared_and_none_counts_as_zeros(objective):
    make, _ = SMALL["critic"]
    shapes = [(), *(p.shape for _, p in sorted(make().named_parameters()))]
    assert any(len(shape) == 1 for shape in shapes)
    for run in variants("critic", objective)[0].values():
        result = run()
        assert [t.shape for t in result] == shapes
        biases = [t for t in result[1:] if t.ndim == 1]
        assert all(bool(t.any()) == (objective == "loss+r1") for t in biases)


def test_a_frozen_or_unused_parameter_is_no_obstacle_to_any_variant(monkeypatch):
    class Model(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Linear(6, 8), nn.LeakyReLU(0.2), nn.Linear(8, 1))
            self.unused = nn.Linear(6, 1)
            self[0].requires_grad_(False)

        def forward(self, x):
            return self[2](self[1](self[0](x)))

    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # test the function that would be compiled
    for name in ("loss+r1", "d-step/wgan-gp"):
        setup = lambda *_, name=name: batches(Model, (5, 6), name, CPU, torch.float32)  # noqa: E731
        case = dataclasses.replace(CASES["loss+r1/critic64-batch4"], setup=setup)
        runs, errors, left_out = prepare(case, CPU, optional=True)
        assert left_out == {}
        assert max(errors.values()) <= 1e-4
        for run in runs.values():
            _, *gradients = run()
            assert [t.shape for t in gradients] == [(1,), (1, 8), (1,), (1, 6)]
            assert gradients[1].any()
            assert not gradients[2].any()
            assert not gradients[3].any()


def check(name, objective):
    runs, errors, _ = variants(name, objective, torch.float64)
    assert list(runs) == [BASELINE, "fastgan"]
    assert errors["fastgan"] <= 1e-9
    assert all(t.isfinite().all() for t in runs["fastgan"]())


@pytest.mark.parametrize("name", AFFINE)
def test_a_piecewise_affine_discriminator_takes_less_work_and_one_pass(name):
    make, shape = SMALL[name]
    assert fastgan.explain_penalty(make(), torch.randn(shape)) == "one pass"
    runs, *_ = variants(name, "loss+r1")
    ratio = count_flops(runs["fastgan"]) / count_flops(runs[BASELINE])
    assert ratio <= 0.75  # 4 of 6 forwards, except for the first and the last layer


def test_flops_are_those_of_the_convolutions_and_products():
    layer, x = nn.Conv2d(3, 4, 3), torch.randn(2, 3, 8, 8)
    forward = 2 * (2 * 4 * 6 * 6) * (3 * 9)
    assert count_flops(lambda: layer(x)) == forward
    assert count_flops(lambda: layer(x).sum().backward()) == 2 * forward  # none by x, which needs no gradient
    grouped, transposed = nn.Conv2d(4, 8, 3, groups=2), nn.ConvTranspose2d(4, 2, 3, stride=2)
    y = torch.randn(2, 4, 8, 8, requires_grad=True)
    forward = 2 * (2 * 8 * 6 * 6) * (2 * 9)
    assert [count_flops(call) for call in (lambda: grouped(y), lambda: grouped(y).sum().backward())] == [
        forward,
        3 * forward,
    ]
    assert count_flops(lambda: transposed(y).sum().backward()) == 3 * 2 * (2 * 4 * 8 * 8) * (2 * 9)
    assert count_flops(lambda: torch.ones(3, 4) @ torch.ones(4, 5)) == 2 * 3 * 4 * 5


def test_a_generators_step_gives_the_gradients_of_pytorchs():
    z = torch.randn(4, generators.LATENT)
    for generator in (generators.dcgan((16, 8), 16), generators.resnet((16, 8, 4), 16)):
        judge = discriminators.StyleGAN2(16, 4)
        setup = lambda *_, g=generator, d=judge: g_step(  # noqa: E731
            seeded(lambda: copy.deepcopy(g), CPU, z.dtype), seeded(lambda: copy.deepcopy(d), CPU, z.dtype), z
        )
        case = dataclasses.replace(CASES["g-step/dcgan64-batch16"], setup=setup)
        runs, errors, _ = prepare(case, CPU)
        assert list(runs) == [BASELINE, "fastgan"]
        assert errors["fastgan"] <= 1e-4


def test_a_whole_step_has_the_optimizers_work_but_computes_the_same_each_time():
    make, shape = SMALL["critic"]
    real, fake = torch.randn(shape), torch.randn(shape)
    whole = OBJECTIVES["d-step/wgan-gp"]
    for objective in (whole, dataclasses.replace(whole, whole=False)):
        run = d_step(seeded(make, CPU, torch.float32), real, fake, objective)["fastgan"]()
        first = [t.clone() for t in run()]
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            run()
        assert any("Optimizer.step" in event.key for event in profile.key_averages()) is objective.whole


def test_the_unconverted_model_is_pytorchs_alone():
    for make, _ in SMALL.values():
        assert not [type(m) for m in make().modules() if type(m).__module__.startswith("fastgan.nn")]


def test_a_step_is_measured_with_its_work_and_memory():
    case = CASES["wgan-gp/mlp512-batch256"]
    assert case.name in SUITES["steps"]
    assert case.name in SUITES["memory"]
    assert case.counted == COUNTS
    settings = {"suite": "memory", "rounds": 1, "compile": False, "copy_bandwidth": 1e9}
    measured = measure.measure(case, CPU, settings)
    ours, theirs = (measured["variants"][name] for name in ("fastgan", BASELINE))
    assert 0 < ours["flops"] < theirs["flops"]
    assert 0 < ours["peak_bytes"] < theirs["peak_bytes"]
    assert 0 < ours["saved_bytes"] < theirs["saved_bytes"]
