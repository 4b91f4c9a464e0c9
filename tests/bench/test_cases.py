from __future__ import annotations

import dataclasses
import os
from functools import partial

import pytest
import torch

from fastgan.bench import cases
from fastgan.bench.case import BASELINE, OPTIONAL, Case, TooLarge, prepare
from fastgan.bench.cases import CASES, SUITES, attention, minibatch_discrimination, upfirdn2d
from fastgan.bench.cases.spectral_norm import LARGE, SMALL, SNGAN128

CPU = torch.device("cpu")


WHOLE = os.environ.get("FASTGAN_TESTS") == "all"  # also the largest networks, and tensors at their sizes
SMALLER = {upfirdn2d.SHAPE: (1, 4, 16, 16), upfirdn2d.FILTERED: (1, 4, 16, 16)}
ON_CPU = [
    name
    for name in SUITES["ops"]
    if "cpu" in CASES[name].device_types and (WHOLE or not name.startswith("spectral_norm/sngan128/"))
]


def quick(case: Case) -> Case:
    """Return the case with smaller tensors, if its setup takes their shape."""
    if WHOLE or not isinstance(case.setup, partial):
        return case
    function, *given = case.setup.func, *case.setup.args
    arguments = [SMALLER.get(value, value) if isinstance(value, tuple) else value for value in given]
    return dataclasses.replace(case, setup=partial(function, *arguments, **case.setup.keywords))


def parameters(shapes):
    return sum(torch.Size(shape).numel() for shape in shapes)


@pytest.mark.parametrize("name", ON_CPU)
def test_the_variants_of_every_case_agree(name):
    case = quick(CASES[name])
    variants, errors, left_out = prepare(case, CPU)
    assert list(variants) == list(errors)
    assert set(variants) in ({BASELINE, "reference", "fastgan"}, {BASELINE, "cdist", "fastgan"}, {BASELINE, "fastgan"})
    assert not left_out
    assert errors["fastgan"] <= case.tolerance
    # Variants are not one function twice, except where fastgan's operation is PyTorch's kernel.
    by_pytorch = "grid_sample" in name or (name.startswith("attention/") and name.endswith("/forward_backward"))
    assert errors["fastgan"] > 0 or by_pytorch
    for run in variants.values():
        assert all(tensor.isfinite().all() for tensor in run())


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name in SUITES["ops"] if "cuda" in CASES[name].device_types])
def test_the_variants_of_every_case_agree_on_a_gpu(name):
    variants, errors, left_out = prepare(CASES[name], torch.device("cuda"))
    assert "fastgan" in variants
    assert (set(variants) | set(left_out)) - {"reference", "cdist"} == {BASELINE, "fastgan", "triton", "cuda"}
    assert max(errors.values()) <= CASES[name].tolerance


def test_no_two_cases_have_one_name_and_every_suite_runs_on_a_cpu():
    files = [case.name for file in cases._FILES for case in file.CASES]
    assert len(files) == len(set(files))
    for names in SUITES.values():
        assert any("cpu" in CASES[name].device_types for name in names)
    assert {256, 512, 1024} <= {CASES[name].sizes.get("pixels") for name in SUITES["steps"]}


def test_a_baseline_that_does_not_fit_is_left_out_and_the_others_are_compared():
    case = CASES["growth/minibatch_discrimination/N=64"]
    setup = partial(minibatch_discrimination.setup, 7, 3, 2, "forward_backward", naively=True)

    def with_large(device, dtype):
        def too_large():
            raise TooLarge("tensors of 9 GB each do not fit")

        return setup(device, dtype) | {BASELINE: too_large}

    variants, errors, left_out = prepare(dataclasses.replace(case, setup=with_large), CPU)
    assert list(variants) == ["cdist", "fastgan"]
    assert left_out == {BASELINE: "tensors of 9 GB each do not fit"}
    assert errors["fastgan"] <= 1e-4


def test_pairs_that_do_not_fit_a_cpu_are_not_tried():
    makes = minibatch_discrimination.setup(4096, 100, 16, "forward_backward", CPU, torch.float32, naively=True)
    for name, size in ((BASELINE, r"107\.4"), ("cdist", r"6\.7")):
        with pytest.raises(TooLarge, match=f"tensors of {size} GB each do not fit"):
            makes[name]()


@pytest.mark.parametrize("factor", [1.001, float("nan")])
def test_a_wrong_result_is_refused_before_it_is_timed(factor):
    case = CASES["spectral_norm/small/forward"]
    setup = case.setup

    def with_wrong(device, dtype):
        makes = setup(device, dtype)

        def wrong():
            run = makes["fastgan"]()
            return lambda: [factor * weight for weight in run()]

        return makes | {"fastgan": wrong}

    with pytest.raises(ArithmeticError, match=r"small/forward: fastgan differs from torch by .*, tolerance 2e-05"):
        prepare(dataclasses.replace(case, setup=with_wrong), CPU)


@pytest.mark.parametrize("broken", ["fails", "wrong"])
def test_a_variant_that_fails_or_is_wrong_is_left_out_where_that_is_asked_for(broken):
    case = CASES["spectral_norm/small/forward"]
    setup = case.setup

    def with_broken(device, dtype):
        makes = setup(device, dtype)

        def make():
            run = makes["fastgan"]()
            return lambda: [1.01 * weight for weight in run()] if broken == "wrong" else run(1)

        return makes | {"fastgan": make}

    failed: dict[str, str] = {}
    variants, errors, left_out = prepare(dataclasses.replace(case, setup=with_broken), CPU, failed=failed)
    assert list(variants) == list(errors) == [BASELINE, "reference"]
    assert failed == left_out
    assert ("differs from torch" if broken == "wrong" else "TypeError") in failed["fastgan"]


def test_an_optional_variant_that_fails_is_left_out_with_its_reason():
    case = CASES["spectral_norm/small/forward"]
    setup = case.setup

    def fail():
        raise RuntimeError("no compiler")

    failing = dataclasses.replace(case, setup=lambda *where: setup(*where) | {OPTIONAL[0]: fail})
    variants, _, left_out = prepare(failing, CPU, optional=True)
    assert OPTIONAL[0] not in variants
    assert left_out == {OPTIONAL[0]: "RuntimeError: no compiler"}
    assert prepare(failing, CPU)[2] == {}  # not tried


def test_preparing_a_case_leaves_the_random_numbers_of_the_process_alone():
    torch.manual_seed(7)
    expected = torch.rand(4)
    torch.manual_seed(7)
    prepare(CASES["spectral_norm/small/forward"], CPU)
    assert torch.equal(torch.rand(4), expected)


def test_the_lists_have_the_sizes_that_their_results_are_quoted_with():
    assert parameters(SNGAN128) == 18_840_256
    assert parameters(SMALL) == 280_064
    assert parameters(LARGE) * 4 == 116_058_880


def test_the_floor_counts_each_input_and_each_result_once():
    elements = 280_064
    rows = 32 + 64 + 128 + 64 + 64 + 1
    columns = 48 + 512 + 1024 + 1152 + 576 + 4096
    forward, both = (CASES[f"spectral_norm/small/{order}"] for order in ("forward", "forward_backward"))
    assert forward.bytes == 4 * (2 * elements + rows + 2 * columns)
    assert both.bytes - forward.bytes == 4 * (3 * elements + rows + columns)
    assert (forward.operations, both.operations) == (5 * elements, 10 * elements)


def test_attention_is_compared_with_pytorchs_form_in_time_and_peak_unless_its_matrices_do_not_fit(monkeypatch):
    small = partial(attention.setup_if_it_fits, 1, 48)
    case = dataclasses.replace(CASES["memory/attention/4x1024/r1"], setup=small)
    assert "memory/attention/4x4096/r1" in SUITES["memory"]
    assert "peak" in case.counted
    variants, errors, left_out = prepare(case, CPU)
    assert list(variants) == [BASELINE, "fastgan"]
    assert 0 < errors["fastgan"] <= case.tolerance
    assert not left_out
    monkeypatch.setattr(attention, "_free_bytes", lambda device: 1e5)
    variants, _, left_out = prepare(case, CPU)
    assert list(variants) == ["fastgan"]
    assert "do not fit" in left_out[BASELINE]
