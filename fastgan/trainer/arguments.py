"""The arguments of `fastgan train`: a preset, a settings file and flags."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from fastgan.trainer.config import PRESETS, TrainConfig
from fastgan.trainer.flags import settings
from fastgan.trainer.settings import read_table

PLACE = {"folder": " --data PATH"}  # flags that a preset requires
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


def parse_train(arguments: Sequence[str]) -> TrainConfig:
    """Return the settings of a run: those of a preset or of `--config FILE`, modified by the flags."""
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
        if preset.dataset != name:
            raise ValueError(
                f"{file} is for {preset.dataset}, not for {name}: fastgan train {preset.dataset} --config {file}"
            )

    example = f"fastgan train {name}{PLACE.get(name, '')} --steps 500"

    def parse(start: TrainConfig) -> TrainConfig:
        return settings(TrainConfig, f"train {name}", text, example, flags, start)

    config = parse(preset)
    if not config.resume:
        return config
    # Parse again with the run's settings as defaults, so that only the given file and flags count as changes.
    saved = TrainConfig.load(config.folder / "config.json")
    if config.dataset != saved.dataset:
        raise ValueError(f"{config.folder} is a run on {saved.dataset}, not on {config.dataset}")
    start = saved if file is None else TrainConfig.load(file, saved)
    return parse(dataclasses.replace(start, runs=config.runs))  # the folder may have moved


def refuse_other_flags(flags: Sequence[str]) -> None:
    """Raise ValueError for the flags of other trainers, and name the right ones."""
    for flag in flags:
        name = flag.partition("=")[0].replace("_", "-").lower()
        if name in OTHER_FLAGS:
            raise ValueError(f"train has no {flag.partition('=')[0]}: use {OTHER_FLAGS[name]}")


def preset_in(file: Path) -> str:
    """Return the preset that a settings file is for: its data set."""
    try:
        name = read_table(file).get("dataset")
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} is not a valid configuration: {error}") from error
    if name is None:
        raise ValueError(f"{file} does not contain 'dataset': give the preset too, fastgan train PRESET --config FILE")
    return str(name)


def presets(about: str) -> str:
    """Return the help text of `fastgan train` without a preset."""
    lines = [f"  {name:15}{preset}" for name, (preset, _) in PRESETS.items()]
    text = (
        f"{about} --config FILE takes settings from a file, such as fastgan tune's best.json. Settings that the file "
        "does not contain come from the preset."
    )
    example = "example: fastgan train fashion-mnist --name demo --minutes 4"
    return "\n".join(["usage: fastgan train PRESET [--help] [FLAGS]", "", text, "", example, "", *lines])


def take_config(arguments: Sequence[str]) -> tuple[list[str], Path | None]:
    """Return the arguments without `--config FILE`, and the file."""
    rest = list(arguments)
    if sum(argument.partition("=")[0] == "--config" for argument in rest) > 1:
        raise ValueError("--config can be given only once: put the settings into one file")
    for index, argument in enumerate(rest):
        name, given, value = argument.partition("=")
        if name == "--config":
            file = value if given else "".join(rest[index + 1 : index + 2])
            if not Path(file).is_file():
                raise ValueError(f"--config needs an existing settings file, got {file!r}")
            return rest[:index] + rest[index + (1 if given else 2) :], Path(file)
    return rest, None
