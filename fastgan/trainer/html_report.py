"""A run as one HTML file: pictures inside, no network, no scripts, light or dark as the reader's system is."""

from __future__ import annotations

import base64
from html import escape
from pathlib import Path
from typing import Any

from fastgan.trainer.charts import Series, line_chart
from fastgan.trainer.run import RunFolder

STAGES = 8  # pictures of the run's course
Record = dict[str, Any]

STYLE = """
:root { color-scheme: light dark; --ground: #fbfaf8; --ink: #22252b; --faint: #6d727c; --line: #dcdad4;
  --card: #fff; --bad: #a3341f; --good: #2c6e49;
  --s0: #2563a8; --s1: #c2571a; --s2: #2c7a4b; --s3: #8b3f8f; --s4: #8a7a12; --s5: #555b66; }
@media (prefers-color-scheme: dark) { :root { --ground: #16181c; --ink: #e6e4df; --faint: #989ca5; --line: #33363d;
  --card: #1e2126; --bad: #f0866f; --good: #7cc79a;
  --s0: #76aee8; --s1: #eb9a63; --s2: #7cc79a; --s3: #cf91d3; --s4: #d3c25a; --s5: #a3a9b4; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1060px; padding: 2.5rem 1.25rem 4rem; background: var(--ground); color: var(--ink);
  font: 16px/1.55 system-ui, sans-serif; }
h1 { font-size: 2rem; margin: 0; letter-spacing: -.02em; } h2 { font-size: 1.15rem; margin: 2.6rem 0 .8rem; }
p { margin: .3rem 0; max-width: 70ch; } .faint, small { color: var(--faint); }
small { display: block; font-size: .8rem; line-height: 1.35; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: .7rem; margin: 1.4rem 0; }
.cards div { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .7rem .9rem; }
.cards b { display: block; font-size: 1.35rem; font-variant-numeric: tabular-nums; }
.alarm { border-left: 4px solid var(--bad); background: var(--card); padding: .6rem 1rem; margin: .5rem 0; }
.calm { border-left: 4px solid var(--good); background: var(--card); padding: .6rem 1rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(320px, 1fr)); gap: .9rem; }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .7rem .8rem; }
figcaption { font-size: .9rem; } svg { width: 100%; height: auto; display: block; }
svg text { fill: var(--faint); font-size: 11px; } svg .grid { stroke: var(--line); }
polyline { fill: none; stroke-width: 1.6; stroke-linejoin: round; }
.key { margin-left: .6rem; font-size: .8rem; display: inline-block; }
img { max-width: 100%; image-rendering: pixelated; border-radius: 6px; display: block; }
.hero { display: grid; grid-template-columns: repeat(auto-fit, minmax(320px, 1fr)); gap: 1.2rem; align-items: start; }
.stages { display: grid; grid-template-columns: repeat(4, 1fr); gap: .7rem; }
table { border-collapse: collapse; width: 100%; font-size: .93rem; }
td, th { text-align: left; vertical-align: top; padding: .35rem .8rem .35rem 0; border-bottom: 1px solid var(--line); }
td.n { font-variant-numeric: tabular-nums; }
""" + "".join(
    f".s{i} {{ color: var(--s{i}); }} polyline.s{i} {{ stroke: currentColor; }} circle.s{i} {{ fill: currentColor; }}\n"
    for i in range(6)
)


def write(run: RunFolder, title: str, rows: list[tuple[str, str]], quality: Record) -> None:
    """Write report.html from the run's own files, the `rows` of its table and its scores."""
    records = run.read_metrics()
    alarms = [record for record in records if "alarm" in record]
    last = [record for record in records if "d_loss" in record][-1]
    sections = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="faint">{escape(dict(rows).get("trained on", ""))}</p>',
        cards(last, quality),
        "<h2>Alarms</h2>",
        *(alarm_box(alarm) for alarm in alarms),
        "" if alarms else '<p class="calm">None: nothing vanished, diverged, collapsed or was learned by heart.</p>',
        '<h2>Samples</h2><div class="hero">',
        picture(run.samples, "The averaged generator, from fixed noise."),
        picture(run.interpolations, "Each row walks a great circle from one latent to another."),
        picture(run.nearest, "First column: samples. Then the training samples nearest to each, in pixels."),
        "</div>",
        "<h2>Course</h2>",
        f'<div class="stages">{"".join(picture(path, stage_name(path)) for path in stages(run.history))}</div>',
        "<h2>Diagnostics</h2>",
        f'<div class="charts">{"".join(charts(records))}</div>',
        quality_table(quality),
        "<h2>Settings and machine</h2>",
        f"<table>{''.join(f'<tr><th>{escape(key)}</th><td>{escape(value)}</td></tr>' for key, value in rows)}</table>",
    ]
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}: fastgan</title><style>{STYLE}</style></head>\n<body>\n"
    )
    run.html.write_text(page + "\n".join(filter(None, sections)) + "\n</body></html>\n")


def cards(last: Record, quality: Record) -> str:
    images_per_s = last["images_per_s"]
    shown = [
        ("steps", f"{last['step']:,}"),
        ("minutes", f"{last['seconds'] / 60:.1f}"),
        ("images/s", f"{images_per_s:,.0f}"),
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


def picture(path: Path, caption: str) -> str:
    if not path.exists():
        return ""
    data = base64.b64encode(path.read_bytes()).decode()
    text = escape(caption)
    return f'<figure><img alt="{text}" src="data:image/png;base64,{data}"><small>{text}</small></figure>'


def stages(history: Path) -> list[Path]:
    """The first and the last picture and some evenly between."""
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
        line_chart("Losses", series(discriminator="d_loss", generator="g_loss")),
        line_chart(
            "Accuracy of the discriminator",
            series(reals="d_real_accuracy", fakes="d_fake_accuracy"),
            note="Both near 1: it has won. Both near 0.5: it cannot tell.",
        ),
        line_chart(
            "Mean logits",
            series(training_reals="d_train", held_out_reals="d_held_out", fakes="d_fake"),
            note="Held-out reals that sink towards the fakes are overfitting.",
        ),
        line_chart(
            "Diversity",
            series(samples="diversity"),
            note="Different samples in a batch, over those of a batch of reals. A fall to 0 is mode collapse.",
        ),
        line_chart(
            "ADA",
            series(probability="augment_p", sign_on_reals="d_real_sign") if augments else {},
            note="It augments more while the discriminator's sign on training images is above the target.",
        ),
        line_chart("Gradient norms", series(discriminator="d_grad_norm", generator="g_grad_norm"), log=True),
        line_chart(
            "Update over weight",
            series(discriminator="d_update_ratio", generator="g_update_ratio"),
            log=True,
            note="One step's change over the weights' norm; about 1e-3 is usual.",
        ),
        line_chart(
            "Duality gap",
            series(gap="duality_gap", discriminator_gains="d_gain", generator_gains="g_gain"),
            note="What the players gain by twenty steps alone, on held-out data. 0 at an equilibrium.",
        ),
        line_chart("Spectral norms of the raw weights", sigma),
    ]


def quality_table(quality: Record) -> str:
    if "floor" not in quality:
        return ""
    floor: Record = quality["floor"]
    rows = "".join(
        f'<tr><td>{escape(key)}</td><td class="n">{quality[key]:.4g}</td><td class="n">{floor[key]:.4g}</td></tr>'
        for key in floor
    )
    return (
        f"<h2>Quality</h2><p>{quality['n']:,} samples against as many held-out reals, features: "
        f"{escape(quality['extractor'])}. The floor is what training reals score in the samples' place.</p>"
        f"<table><tr><th>metric</th><th>samples</th><th>floor</th></tr>{rows}</table>"
    )
