from __future__ import annotations

import math

import pytest
import torch

from fastgan.trainer.config import PRESETS
from fastgan.trainer.data.sources import load_source
from fastgan.trainer.measure.mode_collapse import Outcome, judge, play, settings, table

CPU = torch.device("cpu")


def test_the_data_itself_finds_every_mode_at_high_quality():
    for dataset, modes in (("ring8", 8), ("grid25", 25)):
        source = load_source(dataset, 0, CPU)
        found, quality, divergence = judge(source.next(2500), source)
        assert found == modes
        assert quality == pytest.approx(1 - math.exp(-4.5), abs=0.01)  # within 3 sigma in two dimensions
        assert divergence < 0.02  # about (modes - 1) / 2 / 2500


def test_a_collapsed_generator_is_seen_in_every_number():
    source = load_source("ring8", 0, CPU)
    samples = source.modes[[0] * 30 + [1] * 10]
    assert judge(samples, source) == (2, 1.0, pytest.approx(0.75 * math.log(6) + 0.25 * math.log(2)))
    assert judge(samples + 0.2, source)[:2] == (0, 0.0)


@pytest.mark.parametrize("protocol", ["pacgan", "preset"])
@pytest.mark.parametrize("variant", ["none", "spectral-norm", "stddev", "discrimination", "pack2"])
def test_every_variant_trains_and_a_seed_repeats(variant, protocol):
    first, second = (play("ring8", variant, 1, 3, CPU, protocol) for _ in range(2))
    assert (first.modes, first.high_quality, first.reverse_kl) == (second.modes, second.high_quality, second.reverse_kl)


@pytest.mark.parametrize("dataset", ["ring8", "grid25"])
def test_of_the_presets_variants_each_has_its_remedy_alone_and_the_preset_is_the_packs(dataset):
    remedies = {}
    for variant in ("none", "spectral-norm", "stddev", "discrimination", "pack2"):
        model = settings(dataset, variant, "preset")[0]
        remedies[variant] = model.spectral_norm, model.minibatch, model.pack
    assert remedies == {
        "none": ("none", "none", 1),
        "spectral-norm": ("fused", "none", 1),
        "stddev": ("fused", "stddev", 1),
        "discrimination": ("fused", "discrimination", 1),
        "pack2": ("fused", "none", 2),
    }
    assert settings(dataset, "pack2", "preset") == (PRESETS[dataset][1].model, PRESETS[dataset][1].optim)


def test_the_table_shows_mean_and_standard_error_beside_the_paper():
    outcomes = [Outcome("ring8", "none", seed, 100, modes, 0.5, 1.0, 12.0) for seed, modes in enumerate((6, 7, 8))]
    line = table(outcomes).splitlines()[2]
    assert line == "| ring8 | none | 3 | 100 | 12 | 7.0 ± 0.6 | 50.0 ± 0.0 % | 1.00 ± 0.00 | 6.3 |"
