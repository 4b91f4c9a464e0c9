"""The README's commands for one's own pictures. `make pictures` runs them at their full length."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fastgan.trainer.data.emoji import find_emoji
from fastgan.trainer.errors import DataError
from tools.pictures import commands, run

README = Path(__file__).parents[2] / "README.md"


def test_the_commands_are_those_of_the_readme():
    lines = re.sub(r"\s*#.*", "", README.read_text().replace("\\\n", " ")).splitlines()
    found = {" ".join(line.split()) for line in lines}
    wanted = [" ".join(["fastgan", *command]) for command in commands(5, 2)]
    assert [line for line in wanted if line not in found] == []


@pytest.mark.long
def test_they_run_on_emoji_that_are_transparent_not_square_and_in_class_folders(tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")  # the font is in the user's cache
    try:
        font = find_emoji()
    except DataError as error:
        pytest.skip(str(error))
    run(tmp_path, font, 0.1, 0.05)
