"""The command before PyTorch is imported: help texts, Ctrl-C, threads and warnings."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from types import ModuleType

import pytest

import fastgan_command
from fastgan import _start, cli

COMMAND_HELPS = [[command, "--help"] for command in cli.COMMANDS if command != "train"]
ROOT = Path(__file__).resolve().parents[2]
HELPS = [[], ["--help"], ["--version"], ["train", "--help"], ["train", "folder", "--help"], *COMMAND_HELPS]
MEASURED = """
import sys, time

sys.argv[1:] = {arguments!r}
import fastgan_command

try:
    fastgan_command.main()
except SystemExit as end:
    assert not end.code
print([time.process_time(), "torch" in sys.modules], file=sys.stderr)
"""


@pytest.mark.parametrize("arguments", HELPS, ids=" ".join)
def test_help_takes_little_time_because_pytorch_is_not_imported(in_tmp_path, arguments):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", MEASURED.format(arguments=arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    seconds, imported = json.loads(done.stderr.replace("False", "false").replace("True", "true"))
    assert not imported
    assert seconds < 1.5  # 0.3 to 0.5 on a free machine; other tests run beside this one
    assert done.stdout.startswith(("usage: ", "fastgan "))


def test_idle_threads_sleep_unless_the_user_wants_otherwise(monkeypatch):
    monkeypatch.setattr(fastgan_command, "needs_no_kernels", lambda _: sys.exit(0))
    for given, wanted in ((None, "passive"), ("active", "active")):
        monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
        if given:
            monkeypatch.setenv("OMP_WAIT_POLICY", given)
        with pytest.raises(SystemExit):
            fastgan_command.main()
        assert os.environ["OMP_WAIT_POLICY"] == wanted


@pytest.mark.parametrize(
    ("options", "arguments", "command"),
    [
        (["-u", "-m", "fastgan"], ["info"], True),  # as torchrun starts it
        (["-W", "ignore", "-mfastgan"], [], True),
        (["-m", "fastgan"], ["run", "train.py"], True),
        (["-m", "other"], ["-m", "fastgan"], False),
    ],
)
def test_python_m_is_known_before_the_package_is_imported(options, arguments, command):
    assert _start.is_command(["python", *options, *arguments], ["-m", *arguments]) == command


def test_a_script_that_imports_the_package_keeps_its_threads():
    assert not _start.is_command(["python", "train.py", "-m", "fastgan"], ["train.py", "-m", "fastgan"])
    assert not _start.is_command(["python", "-c", "import fastgan"], ["-c"])
    assert not _start.is_command(["python"], [""])


AT_TORCH = """
import os, sys

class Stop:
    def find_spec(self, name, *_):
        if name == "torch":
            print("torch", os.environ.get("OMP_WAIT_POLICY"))
            os._exit(sys.stdout.flush() or 0)

sys.meta_path.insert(0, Stop())
sys.argv, sys.orig_argv = ["-m", *sys.argv[1:]], ["python", "-m", "fastgan", *sys.argv[1:]]
import fastgan
"""


@pytest.mark.parametrize(
    ("arguments", "begins"),
    [
        (["info"], "torch passive\n"),
        (["run", "train.py", "--help"], "torch None\n"),  # a script of the user's
        (["train", "folder", "--help"], "usage: fastgan train folder"),
        (["run", "--help"], "usage: fastgan run"),
        (["--version"], "fastgan "),
    ],
)
def test_python_m_sets_the_policy_before_pytorch_and_shows_help_without_it(arguments, begins):
    environment = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    command = [sys.executable, "-c", AT_TORCH, *arguments]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, cwd=ROOT)
    assert found.stdout.startswith(begins)


class Interrupted(ModuleType):
    def __getattr__(self, name: str) -> None:
        raise KeyboardInterrupt


def test_ctrl_c_while_pytorch_is_imported_is_one_line(capsys, monkeypatch):
    with monkeypatch.context() as patch, warnings.catch_warnings():
        patch.setitem(sys.modules, "fastgan.cli", Interrupted("fastgan.cli"))
        assert fastgan_command.main() == 130
    assert capsys.readouterr().err == "\nfastgan: interrupted\n"


def test_ctrl_c_while_python_m_imports_pytorch_is_one_line():
    code = AT_TORCH.replace("os._exit(sys.stdout.flush() or 0)", "raise KeyboardInterrupt")
    done = subprocess.run([sys.executable, "-c", code, "info"], capture_output=True, text=True, cwd=ROOT)
    assert done.stderr == "\nfastgan: interrupted\n"
    assert done.returncode in (-signal.SIGINT, 130)


def test_other_errors_of_python_m_keep_their_traceback(capsys):
    _start.show(OSError, OSError("full"), None)
    assert capsys.readouterr().err == "OSError: full\n"


WITHOUT_NUMPY = """
import sys

sys.modules["numpy"] = None
sys.argv[1:] = ["info"]
import fastgan_command

sys.exit(fastgan_command.main())
"""


def test_pytorchs_warning_of_a_missing_numpy_is_not_shown(in_tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_NUMPY],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("fastgan ")
