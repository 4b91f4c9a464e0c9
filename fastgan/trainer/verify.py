"""Lockstep verification: a fused and a pure PyTorch copy of one GAN take the same steps from the same state.

The networks are the preset's with SiLU for their ReLUs, and the loss is the smooth one: where a kink decides,
a difference in the last bit picks another slope, and the gradient's error says nothing about the kernels.
The speed is measured on the preset as it is.

Before each half-step the fused copy gets the pure copy's state, so that what is compared is the error of one
half-step and nothing that training made of it. Tolerances, for float32:

- losses: 1e-5, relative to max(1, |loss|), since a mean of logits of order 1 may cancel.
- gradients: 1e-4 of each tensor's norm. A tensor whose gradient cancels (the last bias, real against fake)
  carries the rounding of the whole gradient, so no norm counts as less than 1e-3 of the whole one.
- u, v: 1e-5; both are unit vectors.
- updates (what Adam adds to the weights): 2e-2 of the norm over all weights. In its first steps Adam divides
  a gradient by about its own size, so an element whose gradient is smaller than its error may move lr the
  wrong way. A relative error e in the gradient makes a share of about e of the elements do so, which is
  2 sqrt(e) of the update's norm: 2e-2 for the 1e-4 above.

A third copy runs freely from the common start. Training amplifies rounding, so its drift is reported, and
not judged.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastgan import backends
from fastgan.trainer.config import PRESETS, DatasetName, SpectralNorm
from fastgan.trainer.data import load_source
from fastgan.trainer.device import choose_device, environment
from fastgan.trainer.gan import GAN
from fastgan.trainer.losses import LOSSES

TOLERANCES = {"loss": 1e-5, "gradient": 1e-4, "uv": 1e-5, "update": 2e-2}
LEAST_SHARE = 1e-3  # of the whole gradient's norm


@dataclass(frozen=True)
class VerifyConfig:
    dataset: DatasetName = "discs"  # what both copies learn; discs needs no files
    data: Path | None = None  # folder of Fashion-MNIST's files, as for fastgan train
    steps: int = 32
    timed_steps: int = 20  # for each variant of spectral norm, in turns
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = None  # CPU threads; unset: PyTorch's choice
    backend: Literal["auto", "reference", "cpu", "triton", "cuda"] = "auto"  # of the fused copy
    out: Path | None = None  # folder to write verify.json to, such as runs/demo

    def __post_init__(self) -> None:
        for name in ("steps", "timed_steps", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")


@dataclass
class Errors:
    """The largest error of each kind, and the tensor that it was found in."""

    worst: dict[str, tuple[float, str]] = dataclasses.field(default_factory=dict)

    def add(self, kind: str, error: float, where: str) -> None:
        # NaN is larger than everything: a kernel that returns it must not pass.
        if kind not in self.worst or math.isnan(error) or error > self.worst[kind][0]:
            self.worst[kind] = (error, where)

    def breaches(self) -> list[str]:
        return [
            f"{kind} of {where}: {error:.1e}, tolerance {TOLERANCES[kind]:.0e}"
            for kind, (error, where) in self.worst.items()
            if not error <= TOLERANCES[kind]
        ]


def verify(config: VerifyConfig) -> bool:
    """Run the verification, print what was found, and say whether every step kept to the tolerances.

    Raises:
        BackendUnavailable: the backend asked for cannot run here.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    device = choose_device(config.device)
    backend = backends.select("spectral_norm", device, torch.float32, _forced(config))
    print(f"{config.dataset} on {device}: fused spectral norm ({backend}) against PyTorch's parametrization")
    with backends.use_backend(config.backend):
        # Deterministic float32 convolutions: spectral norm is compared here, not cuDNN's choices.
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            steps = lockstep(config, device)
        breaches = [f"step {step['step']}: {breach}" for step in steps for breach in step["breaches"]]
        speed = compare_speed(config, device)
    for breach in breaches:
        print(f"BREACH {breach}")
    print(
        f"{'PASS' if not breaches else 'FAIL'}: {config.steps} steps, tolerances "
        + ", ".join(f"{kind} {tolerance:.0e}" for kind, tolerance in TOLERANCES.items())
    )
    print(
        f"median step of both players: fused {speed['fused_ms']:.2f} ms, PyTorch {speed['torch_ms']:.2f} ms, "
        f"no spectral norm {speed['none_ms']:.2f} ms; fused is {speed['fused_over_torch']:.2f}x as fast"
    )
    if config.out:
        result = {
            "passed": not breaches,
            "dataset": config.dataset,
            "backend": backend,
            "tolerances": TOLERANCES,
            "steps": config.steps,
            "speed": speed,
            "environment": environment(device),
            "per_step": steps,
        }
        config.out.mkdir(parents=True, exist_ok=True)
        (config.out / "verify.json").write_text(json.dumps(result, indent=2) + "\n")
    return not breaches


def _forced(config: VerifyConfig) -> str | None:
    return None if config.backend == "auto" else config.backend


def lockstep(config: VerifyConfig, device: torch.device) -> list[dict[str, Any]]:
    """The errors of each step, printed as they are found."""
    kinds: tuple[SpectralNorm, ...] = ("torch", "fused", "fused")
    reference, fused, free = (smooth(build(config, kind, device)) for kind in kinds)
    copy_state(reference, free)
    print(f"{'step':>4} {'D loss':>8} {'G loss':>8}" + "".join(f"{kind:>10}" for kind in TOLERANCES) + "     drift")
    steps: list[dict[str, Any]] = []
    for step in range(1, config.steps + 1):
        errors = Errors()
        real, z_d, z_g = reference.real(), reference.latents(), reference.latents()
        losses = []
        for name, inputs in (("discriminator", (real, z_d)), ("generator", (z_g,))):
            copy_state(reference, fused)
            losses.append(compare_half_step(reference, fused, name, inputs, errors))
            getattr(free, f"{name}_step")(*inputs)
        drift = relative_drift(reference, free)
        steps.append(
            {
                "step": step,
                "d_loss": losses[0],
                "g_loss": losses[1],
                "errors": {kind: error for kind, (error, _) in errors.worst.items()},
                "where": {kind: where for kind, (_, where) in errors.worst.items()},
                "breaches": errors.breaches(),
                "drift": drift,
            }
        )
        columns = "".join(f"{errors.worst[kind][0]:10.1e}" for kind in TOLERANCES)
        print(f"{step:4} {losses[0]:8.4f} {losses[1]:8.4f}{columns}{drift:10.1e}", flush=True)
    return steps


def build(config: VerifyConfig, spectral_norm: SpectralNorm, device: torch.device) -> GAN:
    """The preset's game with another kind of spectral norm."""
    preset = PRESETS[config.dataset][1]
    model = dataclasses.replace(preset.model, spectral_norm=spectral_norm)
    source = load_source(config.dataset, config.seed, device, config.data)
    return GAN(model, preset.optim, source, config.seed, device)


def smooth(gan: GAN) -> GAN:
    """Replace what has kinks, in place."""
    gan.loss = LOSSES["non-saturating"]
    for model in (gan.generator, gan.discriminator):
        for module in list(model.modules()):
            for name, child in module.named_children():
                if isinstance(child, nn.ReLU | nn.LeakyReLU):
                    setattr(module, name, nn.SiLU())
    return gan


def copy_state(source: GAN, target: GAN) -> None:
    """Models and optimisers; the keys are the same for every kind of spectral norm."""
    for name in ("generator", "discriminator", "g_adam", "d_adam"):
        # An optimiser adopts the tensors that it loads: without a copy both would share their moments.
        getattr(target, name).load_state_dict(copy.deepcopy(getattr(source, name).state_dict()))


def compare_half_step(reference: GAN, fused: GAN, name: str, inputs: tuple[Tensor, ...], errors: Errors) -> float:
    """Take the step of one player with both copies, add its errors to `errors`, and return the loss."""
    before = weights(getattr(reference, name))
    wanted = getattr(reference, f"{name}_step")(*inputs).item()
    got = getattr(fused, f"{name}_step")(*inputs).item()
    errors.add("loss", abs(got - wanted) / max(1.0, abs(wanted)), name)
    pure, other = getattr(reference, name), getattr(fused, name)
    compare_gradients(pure, other, name, errors)
    compare_updates(before, weights(pure), weights(other), name, errors)
    found = fused.discriminator.state_dict()
    for key, vector in reference.discriminator.state_dict().items():
        if key.endswith(("._u", "._v")):
            errors.add("uv", float((found[key] - vector).norm()), key)
    return float(wanted)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def compare_gradients(reference: nn.Module, fused: nn.Module, name: str, errors: Errors) -> None:
    wanted = {key: gradient(parameter) for key, parameter in reference.named_parameters()}
    least = LEAST_SHARE * math.sqrt(sum(float(g.norm()) ** 2 for g in wanted.values()))
    for key, parameter in fused.named_parameters():
        scale = max(float(wanted[key].norm()), least)
        errors.add("gradient", ratio(float((gradient(parameter) - wanted[key]).norm()), scale), f"{name}.{key}")


def gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def compare_updates(
    before: dict[str, Tensor], wanted: dict[str, Tensor], got: dict[str, Tensor], name: str, errors: Errors
) -> None:
    difference = math.sqrt(sum(float((got[key] - wanted[key]).norm()) ** 2 for key in wanted))
    update = math.sqrt(sum(float((wanted[key] - before[key]).norm()) ** 2 for key in wanted))
    errors.add("update", ratio(difference, update), name)


def relative_drift(reference: GAN, free: GAN) -> float:
    """How far the free copy's weights are from the reference's, as a share of their norm."""
    difference = norm = 0.0
    for name in ("generator", "discriminator"):
        wanted, got = weights(getattr(reference, name)), weights(getattr(free, name))
        difference += sum(float((got[key] - wanted[key]).norm()) ** 2 for key in wanted)
        norm += sum(float(weight.norm()) ** 2 for weight in wanted.values())
    return math.sqrt(difference / norm)


def ratio(difference: float, scale: float) -> float:
    """difference / scale, where nothing differs by nothing."""
    return 0.0 if difference == 0 else difference / scale if scale else math.inf


def compare_speed(config: VerifyConfig, device: torch.device) -> dict[str, float]:
    """Median times of a whole step for fused, per-layer PyTorch and no spectral norm, measured in turns."""
    kinds: tuple[SpectralNorm, ...] = ("fused", "torch", "none")
    copies = {kind: build(config, kind, device) for kind in kinds}
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    for turn in range(-3, config.timed_steps):  # the first turns warm up
        for kind, gan in copies.items():
            started = time.perf_counter()
            gan.step()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if turn >= 0:
                times[kind].append(time.perf_counter() - started)
    median = {kind: 1e3 * statistics.median(values) for kind, values in times.items()}
    return {f"{kind}_ms": value for kind, value in median.items()} | {
        "fused_over_torch": median["torch"] / median["fused"]
    }
