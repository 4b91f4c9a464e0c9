"""The command ``fastgan run``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

USAGE = """usage: fastgan run [--always] [--convert] [--compare N] SCRIPT [ARGUMENTS]
       fastgan run [--always] [--convert] [--compare N] -m MODULE [ARGUMENTS]

Run a training script as python does, with its gradient penalties computed by fastgan's operations.

  --always     use fastgan without timing it against PyTorch
  --convert    also convert layers of models, such as spectral norm, where verify finds no difference on the first batch
  --compare N  take N penalized steps with PyTorch and N with fastgan, print how they differ, and stop

FASTGAN=off in the environment runs the script without fastgan.

example: fastgan run train.py --batch-size 64"""


@dataclass(frozen=True)
class Settings:
    """Args:
    always: use fastgan without timing it against PyTorch.
    compare: number of steps of a comparison. 0: no comparison.
    convert: whether to convert the layers of models too.
    """

    always: bool = False
    convert: bool = False
    compare: int = 0


@dataclass(frozen=True)
class Command:
    settings: Settings
    module: bool
    name: str
    arguments: tuple[str, ...]


def parse(arguments: Sequence[str]) -> Command:
    """Parse the command line. All arguments after the script belong to the script.

    Raises:
        ValueError: an argument is wrong; the message names it.
    """
    settings, rest = Settings(), list(arguments)
    while rest:
        first = rest.pop(0)
        name, given, value = first.partition("=")
        if first == "--always":
            settings = replace(settings, always=True)
        elif first == "--convert":
            settings = replace(settings, convert=True)
        elif name == "--compare":
            value = value if given else rest.pop(0) if rest else ""
            if not value.isdigit() or int(value) < 1:
                raise ValueError(f"--compare needs a number of steps, got {value!r}")
            settings = replace(settings, compare=int(value))
        elif first == "-m":
            if not rest:
                raise ValueError("-m needs the name of a module")
            return _checked(Command(settings, True, rest[0], tuple(rest[1:])))
        elif first.startswith("-") and first != "-":
            raise ValueError(
                f"no option {first}: choose from --always, --convert, --compare N, -m MODULE; the script comes after"
            )
        else:
            return _checked(Command(settings, False, first, tuple(rest)))
    raise ValueError("run needs a script or -m MODULE")


def _checked(command: Command) -> Command:
    if command.settings.convert and command.settings.compare:
        raise ValueError("--compare takes the script's own layers: leave out --convert")
    if command.settings.compare and command.name == "-" and not command.module:
        raise ValueError("--compare runs the script several times: write it to a file instead of the standard input")
    return command


def main(arguments: Sequence[str]) -> int:
    """Run the command and return its exit status. The errors and the SystemExit of the script propagate."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if arguments else 2
    try:
        command = parse(arguments)
    except ValueError as error:
        print(f"fastgan: {error}", file=sys.stderr)
        return 2

    from fastgan.launcher import session
    from fastgan.launcher.script import run_file, run_module

    if command.settings.compare:
        from fastgan.launcher.compare import compare

        return compare(command)
    session.begin_process(command.settings)
    (run_module if command.module else run_file)(command.name, command.arguments)
    return 0
