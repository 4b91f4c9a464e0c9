"""The README and the pages of docs/: their Python runs, their links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
WITH_PYTHON = [page for page in PAGES if "```python" in page.read_text()]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", WITH_PYTHON, ids=name)
def test_the_python_of_a_page_runs(page):
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)
    exec(compile("\n".join(blocks), name(page), "exec"), {})


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_the_links_and_pictures_of_a_page_exist(page):
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        assert target.startswith("http") or (page.parent / target).exists(), target


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
