"""The README and the pages of docs/: their Python runs, their links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.chart import charts
from benchmarks.tables import with_tables
from fastgan import cli
from fastgan.trainer.loop import Trainer

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
WITH_PYTHON = [page for page in PAGES if "```python" in page.read_text()]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.fixture
def demo_run(page, tmp_path, monkeypatch):
    """Create runs/demo, exported, which the page on training uses."""
    if page.name != "training.md":
        return
    pytest.importorskip("safetensors", reason="needs fastgan[export]")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Trainer, "_summarize", lambda trainer: None)
    flags = ["--name", "demo", "--steps", "1", "--width", "4", "--batch-size", "4", "--device", "cpu"]
    assert cli.main(["train", "discs", *flags]) == 0
    assert cli.main(["export", "runs/demo"]) == 0


@pytest.mark.usefixtures("demo_run")
@pytest.mark.parametrize("page", WITH_PYTHON, ids=name)
def test_the_python_of_a_page_runs(page):
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)
    exec(compile("\n".join(blocks), name(page), "exec"), {})


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub and mkdocs make them."""
    prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", prose, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_the_links_and_pictures_of_a_page_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)", page.read_text())
    links += re.findall(r'(?:src|href)="([^"]+)"', page.read_text())
    for link in links:
        if not link.startswith(("http", "mailto:")):
            target, _, anchor = link.partition("#")
            leads_to = page.parent / target if target else page
            assert leads_to.exists(), link
            assert not anchor or anchor in anchors(leads_to), link


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_the_files_that_a_page_names_exist(page):
    for path in re.findall(r"`((?:docs|examples|benchmarks|tests|tools|fastgan|csrc)/[\w./-]+)`", page.read_text()):
        assert (ROOT / path).exists(), path


def test_the_site_links_to_no_page_outside_of_it():
    for page in (ROOT / "docs").glob("*.md"):
        assert not re.search(r"\]\(\.\./", page.read_text()), f"{page.name}: mkdocs has only docs/"


def test_each_decision_is_a_dated_record_of_at_most_14_lines():
    sections = re.split(r"^##+ ", (ROOT / "docs/decisions.md").read_text(), flags=re.MULTILINE)[1:]
    records = [lines for lines in map(str.splitlines, sections) if any(lines[1:])]
    for heading, _, *body in records:
        assert re.match(r"\*20\d\d-\d\d-\d\d(, 20\d\d-\d\d-\d\d)*\.\* ", body[0]), heading
        assert len("\n".join(body).strip().splitlines()) <= 14, heading


def test_the_readme_fits_into_150_lines():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_the_readme_opens_with_the_two_commands():
    commands = re.search(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)[1]
    assert [line.split("#")[0].strip() for line in commands.splitlines()] == ["make demo", "make test"]


def test_every_page_is_in_the_table_of_contents():
    contents = (ROOT / "mkdocs.yml").read_text()
    assert all(page.name in contents for page in (ROOT / "docs").glob("*.md"))


def test_the_error_messages_of_the_troubleshooting_page_are_ones_that_are_raised():
    source = "".join(path.read_text() for path in (ROOT / "fastgan").rglob("*.py"))
    for title in re.findall(r"^\*\*`([^`]+)`", (ROOT / "docs" / "troubleshooting.md").read_text(), flags=re.MULTILINE):
        parts = [
            part.strip()
            for part in re.split(r"\.\.\.|\(\d+, \.\.\.\)|BackendUnavailable:|'cpu'|fastgan\._native", title)
        ]
        longest = max(parts, key=len).strip(" ,:()")
        assert longest in source, longest


@pytest.mark.parametrize("name", ["speedups.svg", "speedups-dark.svg"])
def test_the_chart_is_that_of_the_records(name):
    path = ROOT / "docs" / name
    assert charts()[path] == path.read_text(), "python -m benchmarks.chart"


MEASURED = [page for page in PAGES if re.search("<!-- (measured|case)", page.read_text())]


@pytest.mark.parametrize("page", MEASURED, ids=name)
def test_the_tables_of_a_page_are_those_of_the_records(page):
    assert with_tables(page.read_text()) == page.read_text(), "python benchmarks/tables.py"
