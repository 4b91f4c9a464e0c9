"""The pages in a real browser: no message in the console, no picture missing, nothing wider than the screen."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
from html import escape
from pathlib import Path

import pytest
from PIL import Image

from fastgan.bench import report
from fastgan.bench.record import load
from fastgan.trainer.loop import Trainer

RECORD = Path(__file__).parents[3] / "benchmarks/results/intel-r-xeon-r-processor-2-threads/memory-attention.json"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
REQUIRED = os.environ.get("FASTGAN_BROWSER") == "require"  # make examples installs one
SCRIPT = """<script>onload = () => {
  const view = frames[0], page = view.document, images = [...page.images];
  document.body.append("measured", JSON.stringify(
    [view.innerWidth, page.documentElement.scrollWidth, images.filter(image => !image.naturalWidth).length]));
}</script>"""

pytestmark = pytest.mark.skipif(BROWSER is None and not REQUIRED, reason="no Chromium here: make examples installs it")


def browse(page: Path, width: int, *flags: str) -> tuple[str, list[str]]:
    """Return the output of the browser, and the messages of the page's console."""
    assert BROWSER, "no Chromium was found"
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr"]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={page.parent / 'user'}"]
    command += [f"--window-size={width},2600", *flags, page.as_uri()]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    return done.stdout, re.findall(r".*CONSOLE.*", done.stderr)


def measured(text: str, folder: Path) -> tuple[list[int], list[str]]:
    """Return the widths of a narrow screen and of a page on it, the number of missing pictures, and messages.

    The page is in a frame, because the browser's own window is never this narrow.
    """
    page = folder / "measured.html"
    page.write_text(f'<iframe style="width: 390px; border: 0" srcdoc="{escape(text)}"></iframe>{SCRIPT}')
    printed, messages = browse(page, 1280, "--dump-dom")
    return json.loads(re.findall(r"measured(\[.*?\])", printed)[-1]), messages


@pytest.fixture(params=["run", "bench"])
def page(request, tmp_path, config, monkeypatch) -> Path:
    if request.param == "bench":
        return report.write(load(RECORD), tmp_path, "bench")[-1]
    monkeypatch.setattr("fastgan.trainer.report.pictures.save_losses", lambda metrics, path: None)
    config = dataclasses.replace(config, equilibrium_every=3, score_every=3, optim=config.optim)
    trainer = Trainer(dataclasses.replace(config, log_every=1, optim=dataclasses.replace(config.optim, augment="ada")))
    trainer.train()
    return trainer.run.html.resolve()


@pytest.mark.long
def test_a_page_shows_without_the_network_at_both_widths(page, tmp_path):
    for width in (1280, 390):
        shot = tmp_path / f"{width}.png"
        _, messages = browse(page, width, f"--screenshot={shot}")
        assert messages == []
        with Image.open(shot) as image:
            assert image.size == (width, 2600)
            assert len(image.convert("RGB").getcolors(1 << 24)) > 100
    assert measured(page.read_text(), tmp_path) == ([390, 390, 0], [])


def test_a_message_in_the_console_and_a_missing_picture_are_found(tmp_path):
    wrong = "<body style='margin: 0'><img src=gone.png><p style='width: 900px'>x<script>console.error('oh')</script>"
    found, messages = measured(wrong, tmp_path)
    assert found == [390, 900, 1]
    assert any("oh" in message for message in messages)
