"""``fastgan run`` runs a script or a module as python does: output, exit status, tracebacks, arguments, Ctrl-C."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fastgan.launcher.command import main, parse

ROOT = Path(__file__).resolve().parents[2]
# The command `fastgan run` with a stub of its session, because importing PyTorch takes seconds.
START = """
import sys, types, pathlib
for name in ("fastgan", "fastgan.launcher"):
    module = sys.modules[name] = types.ModuleType(name)
    module.__path__ = [str(pathlib.Path({root!r}, *name.split(".")))]
session = sys.modules["fastgan.launcher.session"] = types.ModuleType("session")
session.begin_process = lambda settings: None
sys.modules["fastgan.launcher"].session = session
from fastgan.launcher.command import main
sys.exit(main(sys.argv[1:]))
"""

SCRIPTS = {
    "takes_arguments": """
        import argparse, sys
        import neighbor
        if __name__ == "__main__":
            parser = argparse.ArgumentParser()
            parser.add_argument("--width", type=int)
            print(parser.parse_args(), sys.argv, sys.path[0], __file__, __name__, __spec__, __package__, neighbor.value)
            print(sorted(globals()), sys.modules["__main__"].__file__, type(__builtins__))
    """,
    "raises": """
        import neighbor
        def inner():
            try:
                neighbor.fail()
            except KeyError as error:
                raise ValueError("out of order") from error
        inner()
    """,
    "exits": "import sys; print('bye'); sys.exit(7)",
    "exits_with_text": "raise SystemExit('no data')",
    "syntax_error": "print('before')\nfor x in: pass",
    "has_its_own_hook": """
        import sys
        sys.excepthook = lambda kind, error, traceback: print("mine", kind, error, traceback.tb_lineno)
        raise ValueError("seen")
    """,
    "pickles": """
        import pickle
        class Mine: pass
        print(type(pickle.loads(pickle.dumps(Mine()))) is Mine)
    """,
    "interrupted": "import os, signal; os.kill(os.getpid(), signal.SIGINT); import time; time.sleep(5)",
    "ends_at_exit": "import atexit; atexit.register(print, 'last'); print('first')",
}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "neighbor.py").write_text("value = 3\ndef fail():\n    return {}['key']\n")
    for name, text in SCRIPTS.items():
        lines = text.strip("\n").split("\n")
        indent = len(lines[0]) - len(lines[0].lstrip())
        (tmp_path / f"{name}.py").write_text("\n".join(line[indent:] for line in lines) + "\n")
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "__main__.py").write_text("import sys; from package import part; print(sys.argv, __package__)\n")
    (package / "part.py").write_text("import sys; print(sys.argv[1:], __name__, __spec__ and __spec__.name)\n")
    return tmp_path


def outcome(folder, *command, script=None):
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, *command]
    result = subprocess.run(
        command,
        cwd=folder,
        capture_output=True,
        text=True,
        env=environment,
        input=script,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored if a shell started pytest with &
    )
    return result.returncode, re.sub("0x[0-9a-f]+", "0x", result.stdout), result.stderr


def assert_same(folder, *command, script=None):
    start = folder / "start_of_fastgan.py"
    start.write_text(START.format(root=str(ROOT)))
    expected = outcome(folder, *command, script=script)
    assert outcome(folder, str(start), *command, script=script) == expected
    return expected


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_runs_as_with_python(folder, name):
    status, _, _ = assert_same(folder, f"{name}.py", *(["--width", "3"] if name == "takes_arguments" else []))
    others = {"raises": 1, "exits": 7, "exits_with_text": 1, "syntax_error": 1, "has_its_own_hook": 1}
    assert status == (others | {"interrupted": -signal.SIGINT}).get(name, 0)


@pytest.mark.parametrize("name", ["package", "package.part", "neighbor"])
def test_a_module_runs_as_with_python(folder, name):
    status, _, _ = assert_same(folder, "-m", name, "--flag", "value")
    assert status == 0


def test_a_script_elsewhere_and_one_that_is_missing(folder):
    below = folder / "below"
    below.mkdir()
    (below / "script.py").write_text("import sys; print(sys.argv, sys.path[0], __file__)")
    assert_same(folder, "below/script.py", "-m", "--always")
    (below / "__main__.py").write_text("import sys, script; print(sys.argv, sys.path[0], __name__)")
    assert assert_same(folder, "below", "x")[0] == 0
    (below / "__main__.py").unlink()
    assert assert_same(folder, "below")[0] == 1
    assert assert_same(folder, "-m", "below")[0] == 1
    assert assert_same(folder, "nothing.py")[0] == 2
    assert assert_same(folder, "-m", "nothing.at.all")[0] == 1


def test_a_script_on_the_standard_input(folder):
    script = "import sys, neighbor\nprint(sys.argv, repr(sys.path[0]), __name__, sorted(globals()), __loader__)\n"
    assert assert_same(folder, "-", "--flag", script=script + "sys.exit(3)\n")[0] == 3
    assert assert_same(folder, "-", script=script + "neighbor.fail()\n")[0] == 1
    assert assert_same(folder, "-", script="for x in: pass")[0] == 1


def test_options_before_the_script_are_the_launchers():
    command = parse(["--always", "--compare=5", "train.py", "--always", "-m"])
    assert command.settings.always
    assert command.settings.compare == 5
    assert (command.module, command.name, command.arguments) == (False, "train.py", ("--always", "-m"))
    assert parse(["-m", "package", "x"]).module
    assert parse(["--convert", "train.py"]).settings.convert


@pytest.mark.parametrize(
    "arguments",
    [
        ["--fast", "x.py"],
        ["--compare", "many", "x.py"],
        ["-m"],
        ["--always"],
        ["--convert", "--compare=5", "x.py"],
        ["--compare=5", "-"],
    ],
)
def test_wrong_options_are_an_error_in_one_line(arguments, capsys):
    assert main(arguments) == 2
    assert capsys.readouterr().err.startswith("fastgan: ")
