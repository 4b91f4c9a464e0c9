"""The documentation site: it builds without a warning, and every public name has its entry in the reference."""

from __future__ import annotations

import html
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastgan
import fastgan.nn.utils

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("mkdocstrings", reason="the site needs mkdocs-material and mkdocstrings (make docs)")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-2000:]
    return folder


@pytest.mark.parametrize("module", [fastgan, fastgan.nn, fastgan.nn.utils, fastgan.ops], ids=lambda m: m.__name__)
def test_every_public_name_has_an_entry_in_the_reference(site, module):
    pages = "".join(page.read_text() for page in (site / "reference").rglob("index.html"))
    anchors = set(re.findall(r'id="([\w.]+)"', pages))
    names = {name for name in module.__all__ if name not in ("__version__", "nn", "ops", "utils")}
    missing = {name for name in names if f"{module.__name__}.{name}" not in anchors}
    assert not missing


@pytest.mark.parametrize("module", [fastgan, fastgan.nn, fastgan.nn.utils, fastgan.ops], ids=lambda m: m.__name__)
def test_each_entry_of_the_reference_is_the_docstring_of_the_name_and_not_of_a_module(site, module):
    pages = "".join(page.read_text() for page in (site / "reference").rglob("index.html"))
    texts = [" ".join(html.unescape(re.sub("<[^>]+>", "", entry)).split()) for entry in pages.split("<h3 ")]
    for name in module.__all__:
        documented = getattr(module, name)
        if name != "__version__" and not inspect.ismodule(documented):
            summary = " ".join((inspect.getdoc(documented) or "").partition("\n\n")[0].replace("`", "").split())
            heading = f"{module.__name__}.{name}¶"
            entries = [text for text in texts if heading in text.replace(" ¶", "¶")]
            assert len(entries) == 1, heading
            assert summary in entries[0]


def test_no_page_asks_the_network_for_anything(site):
    for page in site.rglob("*.html"):
        loaded = re.findall(r'<(?:script|img|iframe)[^>]* src="(https?:[^"]+)"', page.read_text())
        loaded += re.findall(r'<link[^>]* rel="stylesheet"[^>]* href="(https?:[^"]+)"', page.read_text())
        assert not loaded, f"{page.relative_to(site)}: {loaded}"


def test_the_page_on_the_command_line_shows_every_command(site):
    page = (site / "cli" / "index.html").read_text()
    for command in ("train", "run", "verify", "bench", "tune", "export", "info"):
        assert f"fastgan {command}" in page
