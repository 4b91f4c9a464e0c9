from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from types import ModuleType

import pytest

import fastgan_command
from fastgan import __version__, _start, cli
from fastgan.trainer import config
from fastgan.trainer.config import PRESETS, TrainConfig
from fastgan.trainer.flags import flags_of
from fastgan.trainer.tune.config import TuneConfig
from fastgan.trainer.use import config as use_config
from fastgan.trainer.verify.config import VerifyConfig

COMMAND_HELPS = [[command, "--help"] for command in cli.COMMANDS if command != "train"]
ROOT = Path(__file__).resolve().parents[2]
RING = ["train", "ring8", "--steps", "3", "--width", "8", "--batch-size", "16", "--device", "cpu"]


@pytest.fixture
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


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


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nosuch"], "no preset 'nosuch'"),
        ([], "needs a preset as its first argument"),
        (["--seed", "1"], "needs a preset as its first argument"),
    ],
)
def test_an_unknown_preset_is_one_line_that_names_the_known(arguments, says, capsys):
    assert cli.main(["train", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.endswith(f"{says}: choose from {', '.join(PRESETS)}\n")
    assert error.count("\n") == 1


WRONG = [
    (["--stesp", "3"], "train discs has no --stesp: did you mean --steps?"),
    (["--nonsense"], "train discs has no --nonsense: --help lists the flags"),
    (["-n", "demo"], "train discs has no -n: --help lists the flags"),
    (["--steps"], "--steps needs a value: a whole number"),
    (["--steps", "--seed", "1"], "--steps needs a value: a whole number"),
    (["--steps=many"], "--steps must be a whole number, got 'many'"),
    (["--d-lr", "fast"], "--d-lr must be a number, got 'fast'"),
    (["--minutes", "soon"], "--minutes must be a number, got 'soon'"),
    (["--betas", "0.5"], "--betas must be a list of 2 values, each a number, got '0.5'"),
    (["--lr-decay", "5", "2.5"], "--lr-decay must be a list of 2 values, each a whole number, got '5 2.5'"),
    (["--lr-decay", "5", "2"], "lr_decay must be two steps, the first before the second, got (5, 2)"),
    (["--optimizer", "sgd"], "--optimizer must be one of adam, optimistic-adam, extra-adam, got 'sgd'"),
    (["--channels", "2"], "--channels must be one of 1, 3, 4, got '2'"),
    (["--data", ""], "--data must be a path, got ''"),
    (["--mirror=yes"], "--mirror takes no value, got 'yes'"),
    (["--batch-size", "-1"], "batch_size must be positive, got -1"),
    (["photos"], "train discs has no argument 'photos': flags start with --"),
    (["."], "train discs has no argument '.': did you mean --data .?"),
]


@pytest.mark.parametrize(("flags", "says"), WRONG, ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_a_wrong_flag_is_one_line(flags, says, capsys):
    assert cli.main(["train", "discs", *flags]) == 2
    assert capsys.readouterr().err == f"fastgan: {says}\n"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["generate"], "generate needs RUN: fastgan generate --help describes it"),
        (["project", "runs/x"], "project needs PICTURE: fastgan project --help describes it"),
        (["export", "a", "b"], "export has no argument 'b': flags start with --"),
        (["generate", "runs/x", "--trunc", "1"], "generate has no --trunc: did you mean --truncation?"),
        (["evaluate", "--run", "x"], "evaluate has no --run: --help lists the flags"),
        (["tune", "ring8", "--image_sise", "3"], "tune has no --image_sise: did you mean --image-size?"),
        (["verify", "--quik"], "verify has no --quik: did you mean --quick?"),
        (["bench", "--suit", "x", "y"], "unrecognized arguments: y; fastgan bench --help lists the flags"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_argument_of_any_command_is_one_line(arguments, says, capsys):
    try:
        status = cli.main(arguments)
    except SystemExit as end:  # argparse's
        status = end.code
    assert status == 2
    assert capsys.readouterr().err == f"fastgan: {says}\n"


def test_flags_are_read_in_every_form():
    flags = (
        "--d_lr=0.5 --betas 0 0.9 --mirror --no-mirror --optimiser extra-adam --data a=b --minutes None --channels 1"
    )
    config = cli.parse_train(["folder", *flags.split(), "--image-size", "64x32", "--lr-decay", "2", "3"])
    assert (config.optim.d_lr, config.optim.betas, config.optim.optimizer) == (0.5, (0, 0.9), "extra-adam")
    assert (str(config.data), config.minutes, config.image_size) == ("a=b", None, "64x32")
    assert (config.pictures.mirror, config.pictures.channels, config.optim.lr_decay) == (False, 1, (2, 3))
    assert cli.parse_train(["folder", "--image-size", "64"]).image_size == 64


@pytest.mark.parametrize(
    ("command", "kind"),
    [
        (["train", "folder"], TrainConfig),
        (["tune"], TuneConfig),
        (["verify"], VerifyConfig),
        *(([name], getattr(use_config, f"{name.title()}Config")) for name in ("export", "generate")),
        *(([name], getattr(use_config, f"{name.title()}Config")) for name in ("evaluate", "project")),
    ],
)
def test_the_flags_that_are_read_are_those_that_the_help_shows(command, kind, capsys):
    with pytest.raises(SystemExit):
        cli.main([*command, "--help"])
    shown = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", capsys.readouterr().out.partition("options")[2]))
    read = {name for name, flag in flags_of(kind).items() if not flag.positional and not name.startswith("--no-")}
    assert read <= shown


@pytest.mark.parametrize("preset", PRESETS)
def test_help_of_a_preset_shows_its_own_defaults_and_an_example(preset, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", preset, "--help"])
    assert caught.value.code == 0
    words = " ".join(capsys.readouterr().out.replace("│", " ").split())
    config = PRESETS[preset][1]
    assert f"(default: {config.optim.d_lr})" in words
    assert f"(default: {config.model.width})" in words
    assert f"example: fastgan train {preset}" in words
    assert ("--data PATH --steps 500" in words) == (preset == "folder")


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


@pytest.mark.parametrize("flag", cli.OTHER_FLAGS)
def test_flags_of_other_trainers_get_the_right_one_named(flag, capsys):
    assert cli.main(["train", "folder", flag, "1"]) == 2
    error = capsys.readouterr().err
    assert error == f"fastgan: train has no {flag}: use {cli.OTHER_FLAGS[flag]}\n"
    with pytest.raises(SystemExit):
        cli.main(["train", "folder", "--help"])
    known = set(re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out))
    assert flag not in known
    named = set(re.findall(r"--[a-z][a-z-]*", cli.OTHER_FLAGS[flag])) - {"--nproc-per-node", "--help"}
    assert named <= known


def test_flags_change_the_preset():
    config = cli.parse_train(["fashion-mnist", "--name", "demo", "--minutes", "4", "--spectral-norm", "none"])
    assert (config.name, config.minutes, config.model.spectral_norm) == ("demo", 4.0, "none")
    assert config.optim == PRESETS["fashion-mnist"][1].optim


def test_a_configuration_survives_its_file(tmp_path):
    config = PRESETS["grid25"][1]
    (tmp_path / "config.json").write_text(json.dumps(config.to_json()))
    assert TrainConfig.load(tmp_path / "config.json") == config


@pytest.mark.parametrize(
    "flags",
    [
        *(["--steps", "0"], ["--name", "a/b"], ["--ema-decay", "1"], ["--resume", "--overwrite"]),
        *(["--seed", "-1"], ["--seed", "99999999999999999999"], ["--threads", "100000000"], ["--threads", "0"]),
        *(["--d-lr", "inf"], ["--ema-rampup", "0"], ["--ema-kimg", "nan"]),
    ],
)
def test_a_value_that_makes_no_sense_is_refused(flags, capsys, in_tmp_path):
    assert cli.main([*RING, *flags]) == 2
    error = capsys.readouterr().err
    assert flags[0].removeprefix("--").replace("-", "_") in error
    assert error.count("\n") == 1
    assert not any(in_tmp_path.iterdir())


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
    config = cli.parse_train(command[1:])
    config.folder.mkdir(parents=True)
    (config.folder / "config.json").write_text(json.dumps(config.to_json()))
    resumed = cli.parse_train([*command[1:], "--resume", "--no-tensorboard"])
    assert (resumed.model.channels_last, resumed.tensorboard) == (True, False)
    assert cli.parse_train([*command[1:], "--config", "runs/ring8/config.json"]).model.channels_last
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


def test_a_file_may_contain_only_some_settings(in_tmp_path):
    Path("some.json").write_text('{"steps": 7, "optim": {"d_lr": 0.5}, "width": 3}')
    config = cli.parse_train(["grid25", "--config", "some.json", "--seed", "4"])
    preset = PRESETS["grid25"][1]
    assert (config.steps, config.optim.d_lr, config.model.width, config.seed) == (7, 0.5, 3, 4)
    assert config.optim.g_lr == preset.optim.g_lr
    Path("other.json").write_text('{"dataset": "ring8", "steps": 9}')
    config = cli.parse_train(["--config", "other.json"])
    assert (config.dataset, config.steps, config.name) == ("ring8", 9, "ring8")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"stpes": 3}', "no setting 'stpes': did you mean 'steps'?"),
        ('{"model": {"widht": 3}}', "no setting 'widht': did you mean 'width'?"),
        ('{"optim": {"batchsize": 3}}', "no setting 'batchsize': did you mean 'batch_size'?"),
        ("[1]", "it is not a table of settings"),
        ("{", "Expecting property name"),
        ('{"optim": 3}', "optim"),
    ],
)
def test_a_file_that_is_wrong_is_one_line_that_names_the_right_setting(in_tmp_path, capsys, content, says):
    Path("wrong.json").write_text(content)
    assert cli.main(["train", "ring8", "--config", "wrong.json"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fastgan: wrong.json is not a valid configuration: ")
    assert says in error
    assert error.count("\n") == 1


def test_a_file_without_a_data_set_needs_a_preset(in_tmp_path, capsys):
    Path("some.json").write_text('{"steps": 7}')
    assert cli.main(["train", "--config", "some.json"]) == 2
    assert "give the preset too" in capsys.readouterr().err


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


class Interrupted(ModuleType):
    def __getattr__(self, name: str) -> None:
        raise KeyboardInterrupt


def test_ctrl_c_while_pytorch_is_imported_is_one_line(capsys, monkeypatch):
    with monkeypatch.context() as patch, warnings.catch_warnings():
        patch.setitem(sys.modules, "fastgan.cli", Interrupted("fastgan.cli"))
        assert fastgan_command.main() == 130
    assert capsys.readouterr().err == "\nfastgan: interrupted\n"


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


@pytest.mark.parametrize("module", [config, use_config])
def test_a_configuration_needs_no_parser_of_options(module, monkeypatch):
    """tools/gpu.sh trains and verifies where tyro is not installed."""
    monkeypatch.setitem(sys.modules, "tyro", None)
    spec = importlib.util.spec_from_file_location("without_tyro", module.__file__)
    copy = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "without_tyro", copy)
    spec.loader.exec_module(copy)
    assert dataclasses.is_dataclass(copy.TrainConfig if module is config else copy.ExportConfig)


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
