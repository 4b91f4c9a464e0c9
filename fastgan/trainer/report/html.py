"""A run as one HTML file."""

from __future__ import annotations

from functools import partial
from html import escape
from pathlib import Path
from typing import Any

from fastgan.bench import html_page
from fastgan.trainer.progress import plain
from fastgan.trainer.report.charts import Series, line_chart
from fastgan.trainer.run import RunFolder, replace_text

STAGES = 8  # pictures of the training progress
Record = dict[str, Any]
picture = partial(html_page.picture, kind="pixels")


CALM = "None: no vanishing gradient, divergence, mode collapse or overfitting."


def write(run: RunFolder, title: str, rows: list[tuple[str, str]], quality: Record, short: str | None = None) -> None:
    """Write report.html from the run's files, the `rows` of its table, its scores and the warning `short`, if any."""
    records = run.read_metrics()
    alarms = [record for record in records if "alarm" in record]
    last = [record for record in records if "d_loss" in record][-1]
    sections = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="faint">{escape(dict(rows).get("trained on", ""))}</p>',
        f'<div class="alarm"><b>{escape(short)}.</b></div>' if short else "",
        cards(last, quality),
        "<h2>Alarms</h2>",
        *(alarm_box(alarm) for alarm in alarms),
        "" if alarms else '<p class="faint">None yet.</p>' if short else f'<p class="calm">{CALM}</p>',
        '<h2>Samples</h2><div class="hero">',
        picture(run.samples, "The averaged generator, from fixed noise."),
        picture(run.interpolations, "Each row follows a great circle from one latent to another."),
        picture(run.nearest, "First column: samples. Then the training samples nearest to each, in pixels."),
        "</div>",
        "<h2>Progress</h2>",
        f'<div class="stages">{"".join(picture(path, stage_name(path)) for path in stages(run.history))}</div>',
        "<h2>Diagnostics</h2>",
        f'<div class="charts">{"".join(charts(records))}</div>',
        quality_table(quality),
        "<h2>Settings and machine</h2>",
        html_page.properties(rows),
    ]
    replace_text(run.html, html_page.page(title, sections))


def cards(last: Record, quality: Record) -> str:
    images_per_s = last["images_per_s"]
    shown = [
        ("steps", f"{last['step']:,}"),
        ("minutes", f"{last['seconds'] / 60:.1f}"),
        ("pictures a second", plain(images_per_s)),
        ("diversity", f"{last['diversity']:.2f}"),
    ]
    if "covered" in quality:
        shown += [("modes", f"{quality['covered']} of {quality['total']}")]
        shown += [("high quality", f"{quality['high_quality']:.0%}")]
    shown += [
        (key, f"{value:.3g}<small>floor {quality['floor'][key]:.2g}</small>")
        for key, value in quality.items()
        if key.startswith("KID")
    ]
    return f'<div class="cards">{"".join(f"<div>{escape(key)}<b>{value}</b></div>" for key, value in shown)}</div>'


def alarm_box(alarm: Record) -> str:
    what, remedy = escape(alarm["what"]), escape(alarm["try"])
    return f'<div class="alarm"><b>{escape(alarm["alarm"])}</b>, step {alarm["step"]}: {what}.<br>Try: {remedy}</div>'


def stages(history: Path) -> list[Path]:
    """Return the first and the last picture, and some evenly spaced ones between them."""
    paths = sorted(history.glob("step-*.png"))
    if len(paths) <= STAGES:
        return paths
    return [paths[round(index * (len(paths) - 1) / (STAGES - 1))] for index in range(STAGES)]


def stage_name(path: Path) -> str:
    return f"step {int(path.stem.partition('-')[2]):,}"


def charts(records: list[Record]) -> list[str]:
    def series(**names: str) -> dict[str, Series]:
        return {
            label.replace("_", " "): [(r["step"], r[key]) for r in records if key in r] for label, key in names.items()
        }

    augments = any("augment_p" in record for record in records)
    layers = {name for record in records for name in record.get("sigma", {})}
    sigma: dict[str, Series] = {
        name: [(r["step"], r["sigma"][name]) for r in records if name in r.get("sigma", {})] for name in sorted(layers)
    }
    return [
        line_chart("Losses", series(discriminator="d_loss", generator="g_loss"), unit="loss"),
        line_chart(
            "Accuracy of the discriminator",
            series(reals="d_real_accuracy", fakes="d_fake_accuracy"),
            unit="fraction",
            note="Both near 1: the discriminator has won. Both near 0.5: it cannot tell reals from fakes.",
        ),
        line_chart(
            "Mean logits",
            series(training_reals="d_train", held_out_reals="d_held_out", fakes="d_fake"),
            unit="logit",
            note="Held-out reals that drop toward the fakes indicate overfitting.",
        ),
        line_chart(
            "Diversity",
            series(samples="diversity"),
            unit="samples relative to reals",
            note="Different samples in a batch, relative to a batch of reals. A drop to 0 means mode collapse.",
        ),
        line_chart(
            "ADA",
            series(probability="augment_p", sign_on_reals="d_real_sign") if augments else {},
            unit="probability, mean sign",
            note="ADA augments more while the discriminator's mean sign on training images is above the target.",
        ),
        line_chart(
            "Gradient norms", series(discriminator="d_grad_norm", generator="g_grad_norm"), log=True, unit="norm"
        ),
        line_chart(
            "Update over weight",
            series(discriminator="d_update_ratio", generator="g_update_ratio"),
            log=True,
            unit="norm of the update over norm of the weights",
            note="Norm of one step's change relative to the weights' norm; about 1e-3 is usual.",
        ),
        *score_charts(records),
        line_chart(
            "Duality gap",
            series(gap="duality_gap", discriminator_gains="d_gain", generator_gains="g_gain"),
            unit="loss",
            note="What each network gains in twenty steps alone, on held-out data. 0 at an equilibrium.",
        ),
        line_chart("Spectral norms of the raw weights", sigma, unit="largest singular value"),
    ]


def score_charts(records: list[Record]) -> list[str]:
    """Return the curves of `--score-every`: distances, fractions and counts each have their own scale."""
    scored = [record for record in records if "scores" in record]
    names = {name for record in scored for name in record["scores"]}
    fractions = sorted(names & {"density", "coverage", "recall", "precision", "high_quality"})
    distances = sorted(name for name in names if "-" in name)

    def curves(chosen: list[str]) -> dict[str, Series]:
        return {name: [(r["step"], r["scores"][name]) for r in scored if name in r["scores"]] for name in chosen}

    charts = [line_chart(f"{name} on held-out pictures", curves([name]), unit="distance") for name in distances]
    charts.append(line_chart("Modes covered", curves(["covered"] if "covered" in names else []), unit="modes"))
    return [*charts, line_chart("Quality of the samples", curves(fractions), unit="fraction")]


def quality_table(quality: Record) -> str:
    if "unscored" in quality:
        return f"<h2>Quality</h2><p>No scores: {escape(quality['unscored'])}.</p>"
    if "floor" not in quality:
        return ""
    floor: Record = quality["floor"]
    note = f"{quality['note']}. " if "note" in quality else ""
    rows = "".join(
        f'<tr><td>{escape(key)}</td><td class="n">{quality[key]:.4g}</td><td class="n">{floor[key]:.4g}</td></tr>'
        for key in floor
    )
    return (
        f"<h2>Quality</h2><p>{quality['n']:,} samples against equally many held-out reals; features: "
        f"{escape(quality['extractor'])}. {escape(note)}The floor is the score of training reals in place of "
        "samples.</p>"
        f"<table><tr><th>metric</th><th>samples</th><th>floor</th></tr>{rows}</table>"
    )
