"""Draws the chart of measured speed-ups from the committed records: python -m benchmarks.chart

Writes docs/speedups.svg and docs/speedups-dark.svg. A bar is PyTorch's median time divided by fastgan's. Both were
measured alternately in one process.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple
from xml.sax.saxutils import escape

from benchmarks.tables import fastest, threads

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DOCS = ROOT / "docs"

ROWS = (
    ("R3GAN-like step, 64 px", "whole-steps", "d-step/relativistic+r1+r2/r3gan64-batch8"),
    ("DCGAN step, WGAN-GP, 64 px", "whole-steps", "d-step/wgan-gp/dcgan64-batch16"),
    ("SNGAN-ResNet step, 64 px", "whole-steps-sngan", "d-step/hinge/sngan-resnet64-batch16"),
    ("StyleGAN2-like step, 128 px", "whole-steps", "d-step/r1/stylegan2-128-batch8"),
    ("loss + R1, SNGAN-128", "steps", "loss+r1/sngan-width64-128-batch4"),
    ("WGAN-GP penalty, 256 px", "steps", "wgan-gp/critic256-batch8"),
    ("R1 through layer norm", "ops", "norm/layer_norm/r1"),
    ("spectral norm of SNGAN-128", "ops", "spectral_norm/sngan128/forward_backward"),
)
MACHINE = "amd-epyc-2-threads"
# A step that both compile with Inductor.
COMPILED = (
    "DCGAN step, both compiled",
    "amd-epyc-avx512-1-threads/steps-compiled.json",
    "d-step/wgan-gp/dcgan64-batch16",
)
WIDTH = 450  # narrow enough that the text is readable on a phone


class Colors(NamedTuple):
    text: str
    faint: str
    bar: str
    base: str


LIGHT = Colors(text="#1f2328", faint="#59636e", bar="#4051b5", base="#c9d1d9")
DARK = Colors(text="#e6edf3", faint="#9198a1", bar="#8c9eff", base="#4a525c")


def rows() -> list[tuple[str, float]]:
    found = []
    for label, record, name in ROWS:
        measured = json.loads((RESULTS / MACHINE / f"{record}.json").read_text())
        (case,) = [case for case in measured["cases"] if case["name"] == name]
        found.append((label, case["variants"]["fastgan"]["ratio"]["median"]))
    label, record, name = COMPILED
    (case,) = [case for case in json.loads((RESULTS / record).read_text())["cases"] if case["name"] == name]
    best, ours = (fastest(case, variant)["seconds"]["median"] for variant in ("torch.compile", "fastgan, compiled"))
    return [*found, (label, best / ours)]


def machine() -> str:
    origins = (
        json.loads((RESULTS / path).read_text())["provenance"] for path in (f"{MACHINE}/steps.json", COMPILED[1])
    )
    first, compiled = (f"{origin['device']}, {threads(origin)}" for origin in origins)
    return f"{first} (compiled: {compiled})"


def chart(bars: list[tuple[str, float]], measured_on: str, colors: Colors) -> str:
    left, step, height, scale = 225, 30, 18, 160 / max(ratio for _, ratio in bars)
    bottom = 44 + step * len(bars)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {bottom + 28}" role="img"'
        ' font-family="-apple-system, Segoe UI, Helvetica, Arial, sans-serif" font-size="13">',
        "<title>How many times as fast as PyTorch</title>",
        f'<text x="{left}" y="20" fill="{colors.text}" font-weight="600">times as fast as PyTorch</text>',
    ]
    for index, (label, ratio) in enumerate(bars):
        top = 34 + step * index
        middle = top + height / 2 + 4.5
        width = ratio * scale
        lines += [
            f'<text x="{left - 10}" y="{middle}" text-anchor="end" fill="{colors.text}">{escape(label)}</text>',
            f'<rect x="{left}" y="{top}" width="{width:.1f}" height="{height}" rx="3" fill="{colors.bar}"/>',
            f'<text x="{left + width + 8:.1f}" y="{middle}" fill="{colors.text}" font-weight="600">{ratio:.2f}</text>',
        ]
    lines += [
        f'<line x1="{left + scale:.1f}" y1="28" x2="{left + scale:.1f}" y2="{bottom - 12}"'
        f' stroke="{colors.base}" stroke-width="2" stroke-dasharray="4 3"/>',
        f'<text x="{left + scale:.1f}" y="{bottom + 2}" text-anchor="middle" fill="{colors.faint}">PyTorch = 1</text>',
        f'<text x="{WIDTH - 6}" y="{bottom + 20}" text-anchor="end" fill="{colors.faint}" font-size="11">'
        f"CPU: {escape(measured_on)}</text>",
        "</svg>",
        "",
    ]
    return "\n".join(lines)


def charts() -> dict[Path, str]:
    bars, measured_on = rows(), machine()
    return {
        DOCS / "speedups.svg": chart(bars, measured_on, LIGHT),
        DOCS / "speedups-dark.svg": chart(bars, measured_on, DARK),
    }


if __name__ == "__main__":
    for path, text in charts().items():
        path.write_text(text)
