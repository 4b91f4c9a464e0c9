"""A run's report on one page."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastgan import strict_json
from fastgan.trainer.config import TrainConfig
from fastgan.trainer.config import described as described_changes
from fastgan.trainer.data.labels import shown
from fastgan.trainer.device import environment
from fastgan.trainer.gan import GAN
from fastgan.trainer.measure.alarms import describe
from fastgan.trainer.progress import plain
from fastgan.trainer.report import html as html_report
from fastgan.trainer.report.charts import counted
from fastgan.trainer.run import RunFolder, replace_text
from fastgan.words import number_of

SHORT = 1000  # below this number of steps no preset's samples have settled, and few alarms can fire


def too_short(steps: int) -> str | None:
    """Return a warning if the run cannot be judged yet."""
    if steps >= SHORT:
        return None
    return (
        f"Too short to judge: {steps:,} steps, and even {SHORT:,} are few. Samples and scores come from a generator "
        "that has hardly begun to learn, and a missing alarm means little. Raise --steps or --minutes"
    )


def header(config: TrainConfig, device: torch.device, step: int) -> dict[str, Any]:
    """Return the first record of a metrics file, and of each resumption."""
    return {"started_at_step": step, "config": config.to_json(), **environment(device)}


def write(config: TrainConfig, run: RunFolder, gan: GAN, quality: dict[str, Any]) -> None:
    """Write report.md and report.html from the run's files and its generator's scores."""
    records = [record for record in run.read_metrics() if "d_loss" in record]
    last = records[-1]
    where = environment(gan.device)
    images = config.optim.batch_size * last["step"]
    rows = [
        ("trained on", f"{config.dataset}, {counted(images)} real samples in batches of {config.optim.batch_size}"),
        ("generator", f"{parameters(gan.generator):,} parameters, width {config.model.width}"),
        (
            "discriminator",
            f"{parameters(gan.discriminator):,} parameters, spectral norm: {config.model.spectral_norm}",
        ),
        (
            "game",
            f"{config.optim.loss} loss, Adam {config.optim.betas}, learning rates D {config.optim.d_lr:g} "
            f"and G {config.optim.g_lr:g}{schedule(config)}, {config.optim.d_steps} D step(s) per G step, "
            f"EMA {averaging(config)}",
        ),
        ("steps", f"{last['step']:,} in {last['seconds'] / 60:.1f} minutes, seed {config.seed}"),
        (
            "speed",
            f"{plain(images / last['seconds'])} images/s for the whole loop, including pictures and checkpoints",
        ),
        ("final losses", f"discriminator {last['d_loss']:.3f}, generator {last['g_loss']:.3f}"),
        ("device", f"{where['device']}, {number_of(where['threads'], 'thread')}"),
        ("versions", f"fastgan {where['fastgan']}, torch {where['torch']}, Python {where['python']}"),
    ]
    if where["commit"]:
        rows.append(("commit", where["commit"]))
    for step, what in changes_of(run.read_metrics()):
        rows.append(("changed", f"from step {step:,} on: {described_changes(what)}"))
    if gan.source.class_names:
        rows.insert(1, ("classes", f"{len(gan.source.class_names)}: {shown(gan.source.class_names)}"))
    if gan.source.notes:
        rows.insert(1, ("data", "; ".join(gan.source.notes)))
    if "unscored" in quality:
        rows.append(("scores", f"none: {quality['unscored']}"))
    if "note" in quality:
        rows.append(("scores", quality["note"]))
    if best := best_of(run.read_metrics()):
        rows.append(("best generator", f"step {best['step']:,}, cost {best['cost']:.4g}, in {run.best.name}"))
    if "covered" in quality:
        rows.append(("modes", covered(quality)))
    rows += [(key, f"{value:.4g}, floor {quality['floor'][key]:.4g}") for key, value in quality.items() if "-" in key]
    if run.verify.exists():
        rows.append(("verified", verified(strict_json.loads(run.verify.read_text()))))
    short = too_short(last["step"])
    html_report.write(run, config.name, rows, quality, short)
    alarms = [record for record in run.read_metrics() if "alarm" in record]
    rang = "".join(f"- {describe(alarm)}\n" for alarm in alarms) or ("None yet.\n" if short else "None.\n")
    warning = f"**{short}.**\n\n" if short else ""
    table = "\n".join(f"| {key} | {value} |" for key, value in rows)
    replace_text(
        run.report,
        f"# {config.name}\n\n{warning}| | |\n|---|---|\n{table}\n\n"
        f"Samples of the averaged generator from fixed noise; earlier samples are in `{run.history.name}/`.\n\n"
        f"The same with diagnostics on one page: [{run.html.name}]({run.html.name}). Alarms:\n\n{rang}\n"
        f"![samples]({run.samples.name})\n\n![losses]({run.losses.name})\n",
    )


def summary(quality: dict[str, Any]) -> str:
    """Return the scores in one line, with the floors, or why there are none."""
    if "unscored" in quality:
        return f"no scores: {quality['unscored']}"
    floor = quality.get("floor", {})
    chosen = [key for key in quality if "-" in key or key in ("covered", "high_quality", "coverage", "recall")]
    parts = [f"{key} {quality[key]:.4g}" + (f" (floor {floor[key]:.4g})" if key in floor else "") for key in chosen]
    note = f"; {quality['note']}" if "note" in quality else ""
    return f"scores of {quality['n']:,} samples: {', '.join(parts)}{note}" if parts else "no scores"


def best_of(records: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the first record with the lowest cost, or None without scores during training."""
    return min((record for record in records if "cost" in record), key=lambda record: record["cost"], default=None)


def schedule(config: TrainConfig) -> str:
    """Say how the learning rates change over the run."""
    warmup, decay = config.optim.lr_warmup, config.optim.lr_decay
    rise = "" if warmup is None else f", rising over {warmup:,} steps"
    return rise + ("" if decay is None else f", falling to zero from step {decay[0]:,} to {decay[1]:,}")


def averaging(config: TrainConfig) -> str:
    """Say how the generator's weights are averaged."""
    rampup = config.optim.ema_rampup
    return f"{config.optim.average_decay:g}" + ("" if rampup is None else f", rampup {rampup:g}")


def changes_of(records: list[dict[str, Any]]) -> list[tuple[int, dict[str, list[Any]]]]:
    """Return the steps from which the run was resumed with other settings, and these with both values."""
    found: list[tuple[int, dict[str, list[Any]]]] = []
    for record in records:
        if "started_at_step" in record:
            start = record["started_at_step"]
            found = [(step, what) for step, what in found if step < start]  # later steps were lost, and repeated
            if "changed" in record:
                found.append((start, record["changed"]))
    return found


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def covered(quality: dict[str, Any]) -> str:
    if quality["total"] == 1000:
        return f"{quality['covered']} of 1000 in {quality['n']:,} samples, reverse KL {quality['reverse_kl']:.3f}"
    return (
        f"{quality['covered']} of {quality['total']} have a sample within 3 sigma; "
        f"{quality['high_quality']:.0%} of the samples are within 3 sigma of a mode"
    )


def verified(result: dict[str, Any]) -> str:
    verdict = "fused agrees with pure PyTorch" if result["passed"] else "**fused differs from pure PyTorch**"
    return f"{verdict} over {result['steps']} steps; {result['speed']['fused_over_torch']:.2f}x as fast"
