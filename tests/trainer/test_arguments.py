"""The arguments of the commands: presets, flags and settings files, and the errors of wrong ones."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

from fastgan import cli
from fastgan.trainer import config
from fastgan.trainer.arguments import OTHER_FLAGS, parse_train
from fastgan.trainer.config import PRESETS, TrainConfig
from fastgan.trainer.flags import flags_of
from fastgan.trainer.tune.config import TuneConfig
from fastgan.trainer.use import config as use_config
from fastgan.trainer.verify.config import VerifyConfig


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
    (["--lr-decay", "5", "2"], "--lr-decay must be two steps, the first before the second, got (5, 2)"),
    (["--optimizer", "sgd"], "--optimizer must be one of adam, optimistic-adam, extra-adam, got 'sgd'"),
    (["--channels", "2"], "--channels must be one of 1, 3, 4, got '2'"),
    (["--data", ""], "--data must be a path, got ''"),
    (["--mirror=yes"], "--mirror takes no value, got 'yes'"),
    (["--batch-size", "-1"], "--batch-size must be positive, got -1"),
    (["--batch-size", "3", "--accumulate", "2"], "--batch-size 3 must be a multiple of pack * accumulate, 2"),
    (["--resume", "--overwrite"], "--resume and --overwrite exclude each other"),
    (
        ["--crop", "none", "--mirror"],
        "discs has samples of a fixed form: leave out --crop, --mirror (for folder and emoji only)",
    ),
    (["--seed", "-1"], "--seed must be from 0 to 4294967295, got -1"),
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
        (["verify", "--quick"], "--quick needs --matrix: it selects a third of the matrix"),
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
    config = parse_train(["folder", *flags.split(), "--image-size", "64x32", "--lr-decay", "2", "3"])
    assert (config.optim.d_lr, config.optim.betas, config.optim.optimizer) == (0.5, (0, 0.9), "extra-adam")
    assert (str(config.data), config.minutes, config.image_size) == ("a=b", None, "64x32")
    assert (config.pictures.mirror, config.pictures.channels, config.optim.lr_decay) == (False, 1, (2, 3))
    assert parse_train(["folder", "--image-size", "64"]).image_size == 64


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


@pytest.mark.parametrize(
    ("command", "places", "shown"),
    [
        ("verify", "", "--steps INT (default: 32)"),
        ("tune", "[PRESET]", "[PRESET] preset to tune (default: ring8)"),
        ("export", "RUN", "--out {None}|PATH default: generator.safetensors in the run's folder"),
        ("generate", "RUN", "--samples INT number of samples, each a PNG file (default: 16)"),
        ("evaluate", "[RUN]", "--seed INT (default: 0)"),
        ("project", "RUN PICTURE", "--best the best generator"),
    ],
)
def test_help_of_a_command_shows_defaults_and_names_what_is_required(command, places, shown, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main([command, "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    words = " ".join(text.replace("│", " ").split())
    assert re.findall(r"\[?\b(?:RUN|PICTURE|PRESET)\b\]?", text.partition("\n")[0]) == places.split()
    assert shown in words
    assert words.count("(required)") == len([name for name in places.split() if name[0] != "["])
    assert "{True,False}" not in words


@pytest.mark.parametrize("flag", OTHER_FLAGS)
def test_flags_of_other_trainers_get_the_right_one_named(flag, capsys):
    assert cli.main(["train", "folder", flag, "1"]) == 2
    error = capsys.readouterr().err
    assert error == f"fastgan: train has no {flag}: use {OTHER_FLAGS[flag]}\n"
    with pytest.raises(SystemExit):
        cli.main(["train", "folder", "--help"])
    known = set(re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out))
    assert flag not in known
    named = set(re.findall(r"--[a-z][a-z-]*", OTHER_FLAGS[flag])) - {"--nproc-per-node", "--help"}
    assert named <= known


def test_flags_change_the_preset():
    config = parse_train(["fashion-mnist", "--name", "demo", "--minutes", "4", "--spectral-norm", "none"])
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
    assert cli.main(["train", "ring8", *flags]) == 2
    error = capsys.readouterr().err
    assert flags[0] in error
    assert error.count("\n") == 1
    assert not any(in_tmp_path.iterdir())


def test_a_file_may_contain_only_some_settings(in_tmp_path):
    Path("some.json").write_text('{"steps": 7, "optim": {"d_lr": 0.5}, "width": 3}')
    config = parse_train(["grid25", "--config", "some.json", "--seed", "4"])
    preset = PRESETS["grid25"][1]
    assert (config.steps, config.optim.d_lr, config.model.width, config.seed) == (7, 0.5, 3, 4)
    assert config.optim.g_lr == preset.optim.g_lr
    Path("other.json").write_text('{"dataset": "ring8", "steps": 9}')
    config = parse_train(["--config", "other.json"])
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
        ('{"steps": 3, "steps": 4}', "steps is set twice, to 3 and to 4"),
        ('{"width": 3, "model": {"width": 4}}', "width is set twice, in model and outside of it"),
        ('{"optim": {"width": 4}}', "width does not belong to this table: set it outside of the tables"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_a_file_that_is_wrong_is_one_line_that_names_the_right_setting(in_tmp_path, capsys, content, says):
    Path("wrong.json").write_text(content)
    assert cli.main(["train", "ring8", "--config", "wrong.json"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fastgan: wrong.json is not a valid configuration: ")
    assert says in error
    assert error.count("\n") == 1


def test_a_file_of_a_windows_editor_is_read_and_one_in_another_encoding_is_named(in_tmp_path, capsys):
    Path("some.json").write_text('{"steps": 7}', encoding="utf-8-sig")
    assert parse_train(["ring8", "--config", "some.json"]).steps == 7
    Path("some.json").write_text('{"steps": 7}', encoding="utf-16")
    assert cli.main(["train", "ring8", "--config", "some.json"]) == 2
    assert "it is not a text file in UTF-8" in capsys.readouterr().err


def test_a_file_for_another_preset_is_refused_and_so_is_a_second_file(in_tmp_path):
    Path("some.json").write_text('{"dataset": "grid25", "steps": 7}')
    with pytest.raises(ValueError, match=r"is for grid25, not for ring8: fastgan train grid25 --config some\.json"):
        parse_train(["ring8", "--config", "some.json"])
    with pytest.raises(ValueError, match="--config can be given only once"):
        parse_train(["--config", "some.json", "--config=some.json"])


def test_a_resumed_run_takes_the_settings_of_a_file_and_flags_override_both(in_tmp_path):
    Path("runs/ring8").mkdir(parents=True)
    saved = parse_train(["ring8", "--g-lr", "0.1", "--betas", "0", "0.5"])
    Path("runs/ring8/config.json").write_text(json.dumps(saved.to_json()))
    Path("some.json").write_text('{"steps": 7, "d_lr": 0.5, "betas": [0.2, 0.5]}')
    config = parse_train(["ring8", "--resume", "--config", "some.json", "--betas", "0.3", "0.5"])
    assert (config.steps, config.optim.d_lr, config.optim.g_lr, config.optim.betas) == (7, 0.5, 0.1, (0.3, 0.5))


def test_a_file_without_a_data_set_needs_a_preset(in_tmp_path, capsys):
    Path("some.json").write_text('{"steps": 7}')
    assert cli.main(["train", "--config", "some.json"]) == 2
    assert "give the preset too" in capsys.readouterr().err


@pytest.mark.parametrize("module", [config, use_config])
def test_a_configuration_needs_no_parser_of_options(module, monkeypatch):
    """tools/gpu.sh trains and verifies where tyro is not installed."""
    monkeypatch.setitem(sys.modules, "tyro", None)
    spec = importlib.util.spec_from_file_location("without_tyro", module.__file__)
    copy = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "without_tyro", copy)
    spec.loader.exec_module(copy)
    assert dataclasses.is_dataclass(copy.TrainConfig if module is config else copy.ExportConfig)
