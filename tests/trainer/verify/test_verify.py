from __future__ import annotations

import copy
import dataclasses
import json
import math
import re
import sys

import pytest
import torch

from fastgan import cli
from fastgan.trainer.verify.lockstep import TOLERANCES, Errors, Step, copy_state, lockstep, smooth
from fastgan.trainer.verify.verify import VerifyConfig, build, verify

CPU = torch.device("cpu")
CONFIG = VerifyConfig(dataset="ring8", timed_steps=1, device="cpu")


@pytest.mark.parametrize(("dataset", "steps"), [("discs", 2), ("ring8", 4)])
def test_the_fused_copy_keeps_to_the_tolerances_and_the_result_is_written(dataset, steps, tmp_path, capsys):
    assert verify(dataclasses.replace(CONFIG, dataset=dataset, steps=steps, out=tmp_path / "run"))
    assert f"PASS: {steps} steps" in capsys.readouterr().out
    result = json.loads((tmp_path / "run" / "verify.json").read_text())
    assert result["passed"] is True
    assert [step["step"] for step in result["per_step"]] == list(range(1, steps + 1))
    for step in result["per_step"]:
        tolerances = TOLERANCES[torch.float32]
        assert set(step["errors"]) == set(tolerances)
        assert all(0 <= error <= tolerances[kind] for kind, error in step["errors"].items())
    speed = result["speed"]
    assert speed["fused_over_torch"] == pytest.approx(speed["torch_ms"] / speed["fused_ms"])


def test_every_eighth_step_is_shown_below_its_precision_with_the_largest_errors_since_the_last(monkeypatch, capsys):
    def steps(reference, fused, length, dtype, free):
        for number in range(1, length + 1):
            errors = Errors(dtype)
            errors.add("loss", 1.0 if number == 11 else number * 1e-14, "here")
            yield Step(number, (0.0, 0.0), errors, 0.0)

    monkeypatch.setattr("fastgan.trainer.verify.verify.lockstep", steps)
    assert not verify(dataclasses.replace(CONFIG, steps=20, penalty="r1"))
    single, double = re.split("\nfloat64.*\n", capsys.readouterr().out.partition("\nfloat32")[2].partition("BREACH")[0])
    rows = [line.split() for table in (single, double) for line in table.splitlines() if re.match(" +[0-9]", line)]
    assert [(row[0], row[3]) for row in rows] == [
        *(("8", "8.0e-14"), ("11", "1.0e+00"), ("16", "1.6e-13"), ("20", "2.0e-13")),
        ("5", "5.0e-14"),
    ]


BROKEN = {
    "the weights are off": ("loss", lambda weights, us: [1.001 * w for w in weights]),
    "only the gradient is off": (
        "gradient",
        lambda weights, us: [w + 1e-3 * (w - w.detach()) for w in weights],
    ),
    "only u is off": ("uv", lambda weights, us: [u.mul_(1.001) for u in us] and weights),
    "one weight is NaN": ("loss", lambda weights, us: [weights[0] * math.nan, *weights[1:]]),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_kernel_that_is_wrong_by_a_thousandth_makes_verify_exit_non_zero(fault, monkeypatch, capsys):
    kind, spoil = BROKEN[fault]
    module = sys.modules["fastgan.nn.utils.fuse_spectral_norm"]  # the package has a function of this name
    correct = module.normalize

    def broken(weights, us, vs, *settings, **keywords):
        return spoil(correct(weights, us, vs, *settings, **keywords), us)

    monkeypatch.setattr(module, "normalize", broken)
    arguments = ["--dataset", "ring8", "--steps", "1", "--timed-steps", "1", "--device", "cpu"]
    assert cli.main(["verify", *arguments]) == 1
    output = capsys.readouterr().out
    assert "FAIL: 1 steps" in output
    assert f"BREACH step 1: {kind} of " in output


@pytest.mark.small
def test_the_penalty_that_is_verified_is_fastgans_however_small_the_discriminator(monkeypatch):
    arguments = ["--dataset", "ring8", "--penalty", "r1", "--steps", "1", "--timed-steps", "1", "--device", "cpu"]
    assert cli.main(["verify", *arguments]) == 0
    penalties = sys.modules["fastgan.ops.gradient_penalty"]
    correct = penalties.one_pass

    def broken(*arguments):
        logits, penalty = correct(*arguments)
        return logits, 1.001 * penalty

    monkeypatch.setattr(penalties, "one_pass", broken)
    assert cli.main(["verify", *arguments]) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--matrix", "--steps", "3", "--out", "here"], "leave out --steps, --out"),
        (["--matrix", "--dataset", "ring8"], "leave out --dataset"),
        (["--quick"], "--quick needs --matrix"),
    ],
)
def test_flags_that_would_be_ignored_are_refused(arguments, message, capsys):
    assert cli.main(["verify", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_every_step_starts_from_the_pure_copys_state():
    reference, fused = build(CONFIG, "torch", CPU), build(CONFIG, "fastgan", CPU)
    for _ in range(2):
        reference.step()
    copy_state(reference, fused)
    for name in ("generator", "discriminator"):
        wanted, got = getattr(reference, name).state_dict(), getattr(fused, name).state_dict()
        assert wanted.keys() == got.keys()
        assert all(torch.equal(got[key], wanted[key]) for key in wanted)
    for name in ("g_adam", "d_adam"):
        wanted, got = (
            getattr(reference, name).state_dict()["state"],
            getattr(fused, name).state_dict()["state"],
        )
        assert wanted.keys() == got.keys()
        assert all(torch.equal(got[i][key], wanted[i][key]) for i in wanted for key in wanted[i])


def test_a_step_of_the_fused_copy_leaves_the_pure_copy_alone():
    reference, fused = build(CONFIG, "torch", CPU), build(CONFIG, "fastgan", CPU)
    reference.step()
    copy_state(reference, fused)
    before = copy.deepcopy(reference.state_dict())
    fused.step()
    after = reference.state_dict()
    for name in ("g_adam", "d_adam"):
        wanted, got = before[name]["state"], after[name]["state"]
        assert all(torch.equal(got[i][key], wanted[i][key]) for i in wanted for key in wanted[i])
    for name in ("generator", "discriminator"):
        assert all(torch.equal(after[name][key], before[name][key]) for key in before[name])


def test_no_kink_is_left_in_what_is_compared():
    gan = smooth(build(dataclasses.replace(CONFIG, dataset="discs"), "fastgan", CPU))
    layers = [*gan.generator.modules(), *gan.discriminator.modules()]
    assert not any(isinstance(layer, torch.nn.ReLU | torch.nn.LeakyReLU) for layer in layers)
    assert sum(isinstance(layer, torch.nn.SiLU) for layer in layers) == 6
    real, fake = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)
    slopes = torch.autograd.grad(gan.loss.discriminator(real, fake), (real, fake))
    assert [float(slope) for slope in slopes] == [-0.5, 0.5]


def test_a_backend_that_cannot_run_is_one_line(capsys):
    assert cli.main(["verify", "--backend", "cuda", "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fastgan: spectral_norm: backend 'cuda' cannot run on cpu")
    assert error.count("\n") == 1


def test_a_result_that_could_not_be_written_is_one_line_before_the_first_step(tmp_path, capsys, monkeypatch):
    monkeypatch.delattr("fastgan.trainer.verify.verify.compare")
    (tmp_path / "file").touch()
    assert cli.main(["verify", "--device", "cpu", "--out", str(tmp_path / "file" / "run")]) == 2
    assert capsys.readouterr().err == f"fastgan: {tmp_path}/file/run cannot be written to: Not a directory\n"


def test_nan_counts_as_the_largest_error():
    for order in ([math.nan, 1.0], [1.0, math.nan]):
        errors = Errors()
        for error in order:
            errors.add("loss", error, "here")
        assert math.isnan(errors.worst["loss"][0])
        assert len(errors.breaches()) == 1


@pytest.mark.parametrize("statistic", ["stddev", "discrimination"])
def test_only_where_a_kink_cannot_be_smoothed_float32_is_held_to_less(statistic):
    config = dataclasses.replace(CONFIG, minibatch=statistic)
    allowed = {}
    for dtype in (torch.float32, torch.float64):
        reference, fused = (build(config, kernels, CPU) for kernels in ("torch", "fastgan"))
        (step,) = lockstep(reference, fused, 1, dtype)
        assert step.errors.breaches() == []
        allowed[dtype] = step.errors.tolerance("gradient")
    assert allowed == {torch.float32: 5e-3 if statistic == "discrimination" else 1e-4, torch.float64: 1e-10}
