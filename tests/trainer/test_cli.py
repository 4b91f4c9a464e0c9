"""The command `fastgan`: its commands, one-line errors, and messages at the end of a run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fastgan import __version__, cli
from fastgan.trainer.arguments import parse_train
from fastgan.trainer.config import PRESETS

ROOT = Path(__file__).resolve().parents[2]
RING = ["train", "ring8", "--steps", "3", "--width", "8", "--batch-size", "16", "--device", "cpu"]


def test_help_lists_every_command(capsys):
    assert cli.main(["--help"]) == 0
    output = capsys.readouterr().out
    assert all(f"\n  {name} " in output for name in cli.COMMANDS)


def test_no_command_shows_the_help_and_fails(capsys):
    assert cli.main([]) == 2
    assert "usage: fastgan" in capsys.readouterr().out


def test_an_unknown_command_is_one_line_that_names_the_known(capsys):
    assert cli.main(["trian"]) == 2
    assert capsys.readouterr().err == f"fastgan: no command 'trian': choose from {', '.join(cli.COMMANDS)}\n"


def test_the_version_is_shown(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"fastgan {__version__}\n"


def test_help_of_train_and_info_is_shown(capsys):
    assert cli.main(["train", "--help"]) == 0
    output = capsys.readouterr().out
    assert all(f"\n  {name} " in output for name in PRESETS)
    assert cli.main(["info", "--help"]) == 0
    assert "usage: fastgan info" in capsys.readouterr().out


WITHOUT_EXTRAS = """
import sys
import fastgan_command

fastgan_command.skip_package()  # saves the seconds of importing PyTorch
from fastgan import cli

sys.modules.update((package, None) for packages in cli.EXTRAS.values() for package in packages)
for command in (*([name] for name in cli.COMMANDS), ["train", "discs"]):
    try:
        assert cli.main([*command, "--help"]) == 0
    except SystemExit as end:
        assert not end.code
"""


def test_help_needs_no_extra(in_tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", WITHOUT_EXTRAS], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage: ") == len(cli.COMMANDS) + 1
    assert "default: None" not in " ".join(
        done.stdout.replace("│", " ").split()
    )  # the fields' comments say what None stands for


def test_train_runs_is_refused_a_second_time_and_resumes_with_the_runs_own_settings(in_tmp_path, capsys):
    assert cli.main(RING) == 0
    assert "Too short to judge: 3 steps" in capsys.readouterr().out
    assert cli.main(RING) == 2
    assert "ring8 already exists" in capsys.readouterr().err
    assert cli.main(["train", "ring8", "--resume", "--steps", "5"]) == 0
    saved = json.loads(Path("runs/ring8/config.json").read_text())
    assert (saved["steps"], saved["model"]["width"]) == (5, 8)
    assert cli.main(["train", "ring8", "--resume", "--width", "9"]) == 2
    assert "width: 8 -> 9" in capsys.readouterr().err
    assert cli.main(["train", "grid25", "--name", "ring8", "--resume"]) == 2
    assert capsys.readouterr().err == "fastgan: runs/ring8 is a run on ring8, not on grid25\n"


def test_the_same_command_with_resume_goes_on_although_it_switches_something_on(in_tmp_path, capsys):
    command = [*RING, "--tensorboard", "--channels-last"]
    config = parse_train(command[1:])
    config.folder.mkdir(parents=True)
    (config.folder / "config.json").write_text(json.dumps(config.to_json()))
    resumed = parse_train([*command[1:], "--resume", "--no-tensorboard"])
    assert (resumed.model.channels_last, resumed.tensorboard) == (True, False)
    assert parse_train([*command[1:], "--config", "runs/ring8/config.json"]).model.channels_last
    assert cli.main(["train", "ring8", "--resume", "--no-tensorboard", "--no-channels-last"]) == 2
    error = capsys.readouterr().err
    assert "channels_last: True -> False" in error
    assert error.endswith("leave them out, or start a new run from its weights with --init-from runs/ring8\n")


def test_a_disk_that_is_full_in_training_says_how_to_go_on(in_tmp_path, capsys, monkeypatch):
    def fail(trainer: object, bar: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fastgan.trainer.loop.Trainer._record", fail)
    assert cli.main(RING) == 2
    again = "fastgan train ring8 --name ring8 --runs runs --resume"
    assert capsys.readouterr().err.endswith(
        f"fastgan: No space left on device; continue from the last checkpoint with: {again}\n"
    )


def test_an_error_of_the_system_is_a_file_and_words(in_tmp_path, capsys, monkeypatch):
    def fail(arguments: object) -> int:
        raise OSError(28, "No space left on device", "runs/x/samples.png")

    monkeypatch.setitem(cli.COMMANDS, "info", fail)
    assert cli.main(["info"]) == 2
    assert capsys.readouterr().err == "fastgan: runs/x/samples.png: No space left on device\n"


def test_an_export_that_cannot_be_written_is_one_line(in_tmp_path, capsys):
    pytest.importorskip("safetensors", reason="needs fastgan[export]")
    assert cli.main(RING) == 0
    Path("nowhere").touch()
    assert cli.main(["export", "runs/ring8", "--out", "nowhere/generator.safetensors"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("fastgan: ")
    assert "nowhere" in error


def test_missing_data_is_one_line_without_a_traceback(in_tmp_path, capsys):
    assert cli.main(["train", "fashion-mnist", "--data", "nowhere", "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fastgan: no train-images-idx3-ubyte.gz in nowhere")
    assert error.count("\n") == 1


def test_an_interrupted_run_says_how_to_go_on(in_tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("fastgan.trainer.loop.Trainer.train", lambda trainer: 2)
    assert cli.main(RING) == 130
    assert "fastgan train ring8 --name ring8 --runs runs --resume" in capsys.readouterr().out
    assert cli.main([*RING, "--name", "two words"]) == 130
    assert "--name 'two words' --runs runs --resume" in capsys.readouterr().out


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_second_ctrl_c_is_one_line_that_says_how_to_go_on(in_tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("fastgan.trainer.loop.Trainer.train", interrupted)
    assert cli.main(RING) == 130
    output = capsys.readouterr()
    assert "last complete checkpoint with: fastgan train ring8 --name ring8 --runs runs --resume" in output.out
    assert output.err == ""


@pytest.mark.parametrize(
    ("part", "arguments"),
    [
        ("fastgan.trainer.verify.verify.compare", ["verify", "--steps", "1", "--device", "cpu"]),
        ("fastgan.trainer.verify.matrix.compare", ["verify", "--matrix", "--device", "cpu"]),
        ("fastgan.trainer.loop.Trainer.__init__", RING),
        ("fastgan.trainer.export.export", ["export", "runs/ring8"]),
        ("fastgan.info", ["info"]),
    ],
)
def test_ctrl_c_is_one_line(part, arguments, capsys, monkeypatch):
    monkeypatch.setattr(part, interrupted)
    assert cli.main(arguments) == 130
    assert capsys.readouterr().err == "\nfastgan: interrupted\n"


WITHOUT_PACKAGES = """
import sys
from fastgan import cli

for packages in (cli.TRAIN, *([package] for package in cli.TRAIN if package != "fontTools")):
    present = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] in packages}
    for name in [name for name in sys.modules if name.startswith("fastgan.trainer")]:
        del sys.modules[name]  # a module that is there already does not import its packages again
    sys.modules.update(dict.fromkeys(packages))
    assert cli.main(["train", "fashion-mnist", "--device", "cpu", "--data", sys.argv[1]]) == 2
    for package in packages:
        del sys.modules[package]
    sys.modules.update(present)
"""


def test_missing_packages_are_one_line_with_the_command_that_installs_them_all(in_tmp_path, fashion_mnist_folder):
    command = [sys.executable, "-c", WITHOUT_PACKAGES, str(fashion_mnist_folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stderr.splitlines() == [
        f"fastgan train needs {packages}: pip install 'fastgan[train]'"
        for packages in (", ".join(cli.TRAIN), "numpy", "PIL", "matplotlib", "tqdm")
    ]
    assert done.returncode == 0
    assert not (in_tmp_path / "runs").exists()


def test_the_extras_that_messages_name_are_those_of_the_package_and_one_has_them_all():
    tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    names = {"pillow": "PIL", "fonttools": "fontTools"}

    def packages(extra: str) -> set[str]:
        found: set[str] = set()
        for requirement in extras[extra]:
            name, *others = re.match(r"([\w-]+)(?:\[([\w,]+)\])?", requirement).groups()
            found |= {names.get(name, name.replace("-", "_"))} if others == [None] else set()
            found |= {package for other in (others[0] or "").split(",") if other for package in packages(other)}
        return found

    assert {extra: packages(extra) for extra in cli.EXTRAS} == {e: set(brought) for e, brought in cli.EXTRAS.items()}
    assert packages("all") == {package for brought in cli.EXTRAS.values() for package in brought}


@pytest.mark.parametrize(
    ("command", "package", "says"),
    [
        ("tune", "matplotlib", "fastgan tune needs matplotlib: pip install 'fastgan[tune]'"),
        ("bench", "matplotlib", "fastgan bench needs matplotlib: pip install 'fastgan[train]'"),
        ("verify", "numpy", "fastgan verify needs numpy: pip install 'fastgan[train]'"),
        ("export", "safetensors", "fastgan export needs safetensors: pip install 'fastgan[export]'"),
        ("train", "somebody_elses", None),
    ],
)
def test_the_extra_is_the_commands_own_where_that_brings_the_package(command, package, says, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    assert cli.lacking(command, package) == says


def test_info_takes_no_arguments(capsys):
    assert cli.main(["info", "all"]) == 2
    assert "no arguments" in capsys.readouterr().err


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(("number", "status", "said"), [(None, 0, "report.html"), (15, 143, "stopped by signal 15")])
def test_only_the_first_rank_prints_the_end_of_a_run(number, status, said, rank, monkeypatch, capsys):
    class Trainer:
        def __init__(self, config):
            self.step, self.writes = 10_000, rank == 0

        def train(self):
            return number

    monkeypatch.setattr("fastgan.trainer.loop.Trainer", Trainer)
    assert cli.train(["ring8", "--device", "cpu"]) == status
    assert (said in capsys.readouterr().out) == (rank == 0)
