"""Verification of a preset: fastgan and plain PyTorch in lockstep (see lockstep.py), and their speed."""

from __future__ import annotations

import dataclasses
import statistics
import time
from contextlib import AbstractContextManager

import torch

from fastgan import backends, strict_json
from fastgan.trainer.config import SpectralNorm
from fastgan.trainer.data.sources import load_source
from fastgan.trainer.device import choose_device, environment
from fastgan.trainer.game.regularizer import Kernels
from fastgan.trainer.gan import GAN
from fastgan.trainer.run import make_folder, replace_text
from fastgan.trainer.verify.config import VerifyConfig as VerifyConfig
from fastgan.trainer.verify.lockstep import TOLERANCES, Errors, Step, lockstep
from fastgan.trainer.verify.matrix import verify_matrix

PRINTED = 8  # print every eighth step; the file has all of them
NAMES = {
    torch.float32: "float32, with functions that have kinks (ReLU, hinge) replaced by smooth ones",
    torch.float64: "float64, with networks and loss unchanged",
}


def verify(config: VerifyConfig) -> bool:
    """Run the verification, print the results, and return whether every step is within the tolerances.

    Raises:
        BackendUnavailable: the requested backend cannot run here.
        RunFolderError: the result cannot be written.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    device = choose_device(config.device)
    if config.matrix:
        with backends.use_backend(config.backend), exact_convolutions():
            return verify_matrix(device, 1 if config.quick else 4, config.quick)
    backend = backends.select("spectral_norm", device, torch.float32, _forced(config))
    if config.out:
        make_folder(config.out)
    print(
        f"{config.dataset} on {device}, {config.optim.loss} loss, penalty {config.optim.penalty}, "
        f"minibatch {config.model.minibatch}: fastgan ({backend}) against PyTorch"
    )
    # Only a penalty's double backward and minibatch discrimination behave differently with kinks than in float32.
    lengths = {torch.float32: config.steps}
    if config.optim.penalty != "none" or config.model.minibatch == "discrimination":
        lengths[torch.float64] = max(1, config.steps // 4)
    with backends.use_backend(config.backend):
        print(f"\n{LEGEND}")
        with exact_convolutions():
            steps = [step for dtype, n in lengths.items() for step in compare(config, dtype, device, n)]
        speed = compare_speed(config, device)
    breaches = [f"step {step.number}: {breach}" for step in steps for breach in step.errors.breaches()]
    print()
    for breach in breaches:
        print(f"BREACH {breach}")
    print(f"{'PASS' if not breaches else 'FAIL'}: {config.steps} steps")
    print(
        f"median step of both players: fastgan {speed['fused_ms']:.2f} ms, PyTorch {speed['torch_ms']:.2f} ms, "
        f"without spectral norm and penalty {speed['none_ms']:.2f} ms; "
        f"fastgan is {speed['fused_over_torch']:.2f}x as fast as PyTorch"
    )
    if config.out:
        result = {
            "passed": not breaches,
            "dataset": config.dataset,
            "loss": config.optim.loss,
            "penalty": config.optim.penalty,
            "minibatch": config.model.minibatch,
            "backend": backend,
            "tolerances": {str(dtype).removeprefix("torch."): TOLERANCES[dtype] for dtype in lengths},
            "steps": config.steps,
            "speed": speed,
            "environment": environment(device),
            "per_step": [step.to_json() for step in steps],
        }
        replace_text(config.out / "verify.json", strict_json.dumps(result, indent=2) + "\n")
    return not breaches


def exact_convolutions() -> AbstractContextManager[None]:
    """Make cuDNN use deterministic float32 convolutions, so that its choices do not affect the comparison."""
    return torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)


def _forced(config: VerifyConfig) -> str | None:
    return None if config.backend == "auto" else config.backend


LEGEND = """\
The largest errors since the row above, relative to PyTorch: losses, gradients, spectral norm's u and v (uv), and the
optimizers' changes of the weights (update). drift: distance of the weights of a copy that is never reset from PyTorch's
weights; it has no tolerance."""


def compare(config: VerifyConfig, dtype: torch.dtype, device: torch.device, length: int) -> list[Step]:
    """Run both copies and return their steps. Print every eighth step, and each that exceeds a tolerance."""
    forget_compiled(config)
    reference, fused, free = (build(config, kernels, device) for kernels in ("torch", "fastgan", "fastgan"))
    tolerances = TOLERANCES[dtype]
    print(f"\n{NAMES[dtype]}")
    print(f"{'tolerance':>22}" + "".join(f"{value:10.0e}" for value in tolerances.values()))
    print(f"{'step':>4} {'D loss':>8} {'G loss':>8}" + "".join(f"{kind:>10}" for kind in tolerances) + "     drift")
    steps, errors = [], Errors(dtype)
    for step in lockstep(reference, fused, length, dtype, free):
        steps.append(step)
        errors.include(step.errors)
        if step.number % PRINTED and step.number < length and not step.errors.breaches():
            continue
        worst, errors = errors.worst, Errors(dtype)
        columns = "".join(f"{worst[kind][0]:10.1e}" if kind in worst else f"{'-':>10}" for kind in tolerances)
        print(f"{step.number:4} {step.losses[0]:8.4f} {step.losses[1]:8.4f}{columns}{step.drift:10.1e}", flush=True)
    return steps


def forget_compiled(config: VerifyConfig) -> None:
    """Drop the graphs of the copies before: PyTorch runs a function uncompiled if it has too many."""
    if config.optim.compile:
        torch.compiler.reset()


def build(config: VerifyConfig, kernels: Kernels, device: torch.device) -> GAN:
    """Build the preset's GAN with fastgan or with plain PyTorch."""
    model = config.model
    if model.spectral_norm != "none":
        spectral_norm: SpectralNorm = "fused" if kernels == "fastgan" else "torch"
        model = dataclasses.replace(model, spectral_norm=spectral_norm)
    optim = dataclasses.replace(config.optim, kernels=kernels, compile=config.optim.compile and kernels == "fastgan")
    return GAN(model, optim, load_source(config.dataset, config.seed, device, config.data), config.seed, device)


def build_plain(config: VerifyConfig, device: torch.device) -> GAN:
    """Build the preset's GAN without the parts that fastgan accelerates."""
    model = dataclasses.replace(config.model, spectral_norm="none", minibatch="none")
    optim = dataclasses.replace(config.optim, penalty="none")
    return GAN(model, optim, load_source(config.dataset, config.seed, device, config.data), config.seed, device)


def compare_speed(config: VerifyConfig, device: torch.device) -> dict[str, float]:
    """Return median times of a whole step with fastgan, with PyTorch and without penalties. They take turns."""
    forget_compiled(config)
    copies = {
        "fused": build(config, "fastgan", device),
        "torch": build(config, "torch", device),
        "none": build_plain(config, device),
    }
    times: dict[str, list[float]] = {kind: [] for kind in copies}
    for turn in range(-3, config.timed_steps):  # negative turns are a warm-up
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
