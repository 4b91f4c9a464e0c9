"""Generates pages and files of the documentation site during its build. This is a hook of mkdocs (see mkdocs.yml).

The command-line page is generated from the commands' parsers. The changelog is the repository's. KaTeX comes from
build/katex/, where ``make docs`` unpacks it.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

_CASE = re.compile(r" <!-- (?:case|kept) \S+ (\S+) -->")
_INLINE_CODE = re.compile(r"<code>([^<\n]+)</code>")
_HYPHENATED = re.compile(r"(?<!\S)(?=\S*-)\S{2,24}(?!\S)")
ROOT = Path(__file__).resolve().parent.parent
KATEX = ROOT / "build" / "katex" / "package" / "dist"
COMMANDS = {
    "train": ["train", "fashion-mnist"],
    "run": ["run"],
    "verify": ["verify"],
    "bench": ["bench"],
    "tune": ["tune", "fashion-mnist"],
    "export": ["export"],
    "generate": ["generate"],
    "evaluate": ["evaluate"],
    "project": ["project"],
    "info": ["info"],
}

PRINT_HELP = """
import contextlib, io, json, sys
from fastgan.cli import main
texts = []
for arguments in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):
        main([*arguments, "--help"])
    texts.append(text.getvalue())
print(json.dumps(texts))
"""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    pages = {"cli.md": command_line(), "changelog.md": (ROOT / "CHANGELOG.md").read_text()}
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    for path in sorted(KATEX.rglob("*")):
        name = path.relative_to(KATEX).as_posix()
        if name in ("katex.min.js", "katex.min.css", "contrib/auto-render.min.js") or name.endswith(".woff2"):
            files.append(File.generated(config, f"assets/katex/{name}", abs_src_path=str(path)))
    if not KATEX.exists():  # pages then show the source of formulas
        config.extra_css = [name for name in config.extra_css if "katex" not in name]
        config.extra_javascript = [name for name in config.extra_javascript if "katex" not in str(name)]
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Show the name of a measured case below its label, because `fastgan bench --case` takes the name."""
    return _CASE.sub(r"<br><small>\1</small>", markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Keep the words of inline code whole. Browsers would break a flag such as --penalty-weight after any hyphen."""
    return _INLINE_CODE.sub(lambda code: f"<code>{_HYPHENATED.sub(_whole, code[1])}</code>", html)


def _whole(word: re.Match[str]) -> str:
    return f'<span class="whole">{word[0]}</span>'


def command_line() -> str:
    """Return the command-line page, from each command's --help."""
    shown = helps([[], ["train"], *COMMANDS.values()])
    whole, presets, *texts = (f"```text\n{text.rstrip()}\n```" for text in shown)
    parts = ["# Command line", "", "Each section is the output of `fastgan COMMAND --help`.", "", whole]
    for name, text in zip(COMMANDS, texts, strict=True):
        parts += ["", f"## fastgan {name}", ""]
        if name == "train":
            parts += [presets, "", "The flags are the same for every preset; their defaults differ.", ""]
        parts.append(text)
    return "\n".join(parts) + "\n"


def helps(commands: list[list[str]]) -> list[str]:
    """Return the output of `fastgan ... --help` for each command. One process prints all, to import torch only once."""
    environment = {**os.environ, "COLUMNS": "88", "NO_COLOR": "1", "TERM": "dumb", "PYTHONIOENCODING": "utf-8"}
    shown = subprocess.run(
        [sys.executable, "-c", PRINT_HELP, json.dumps(commands)],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env=environment,
    )
    texts: list[str] = json.loads(shown.stdout)
    return texts
