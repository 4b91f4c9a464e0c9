"""Scores of a run's generator, or of a folder of pictures, against real pictures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import ImageOps
from torch import Tensor

from fastgan.trainer.config import TrainConfig
from fastgan.trainer.data.containers import open_container
from fastgan.trainer.data.held_out import sample_reals
from fastgan.trainer.data.image_folder import read_pictures
from fastgan.trainer.data.options import PictureConfig
from fastgan.trainer.data.pixels import UNREADABLE, Layout, endings, open_image
from fastgan.trainer.data.record import DataRecord
from fastgan.trainer.data.size import sides
from fastgan.trainer.device import choose_device
from fastgan.trainer.errors import DataError, RunFolderError, TrainerError
from fastgan.trainer.export import home_of
from fastgan.trainer.measure.extractors import TorchScript, check_extractor, load_extractor
from fastgan.trainer.measure.metrics import inception_score
from fastgan.trainer.measure.quality import LEAST, compare, measures_images
from fastgan.trainer.run import make_folder, require_writable, run_data
from fastgan.trainer.use.config import EvaluateConfig
from fastgan.trainer.use.trained import Trained, load_trained, write_json

PROBABILITIES = 64  # samples in a batch of the Inception Score


@dataclass
class Sets:
    """Pictures (N, C, H, W) in [-1, 1] to compare."""

    fake: Tensor
    real: Tensor
    floor: Tensor | None  # other real pictures, as many
    what: str  # what the fakes are compared with


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Compute the scores, write them to a file and return them.

    Raises:
        TrainerError: there is no run, or too few pictures.
        ValueError: the extractor does not work.
    """
    out = config.out
    if out is None and config.run is not None and (config.run.is_dir() or config.run.suffix == ".pt"):
        out = home_of(config.run) / "evaluation.json"
    if config.out is not None:
        require_file(config.out)
    device = choose_device(config.device)
    trained = None if config.run is None else load_trained(config.run, device, config.best)
    extractor = config.extractor or (trained.config.extractor if trained else TrainConfig.extractor)
    sets = sets_of_run(config, trained) if trained else sets_of_folders(config)
    check_extractor(extractor, tuple(sets.fake.shape[1:]), device)
    loaded = load_extractor(extractor, device)
    found = {"against": sets.what, **compare(sets.real, sets.floor, sets.fake, loaded, extractor, device)}
    if isinstance(loaded, TorchScript):
        batches = [loaded.probabilities(batch.to(device)) for batch in sets.fake.split(PROBABILITIES)]
        if known := [batch.cpu() for batch in batches if batch is not None]:
            found["IS"], found["IS-deviation"] = inception_score(torch.cat(known))
    if len(sets.fake) < config.samples:
        found["note"] = f"{config.samples:,} samples were asked for, but there are only {len(sets.fake):,} pictures"
    if trained:
        found |= {"run": str(config.run), "step": trained.step}
    if out is not None:
        make_folder(out.parent)
        write_json(out, found)
    return found


def require_file(path: Path) -> None:
    """Raise RunFolderError if no file can be written to `path`."""
    if path.is_dir():
        raise RunFolderError(f"out must be a file to write, but {path} is a folder: try {path / 'evaluation.json'}")
    require_writable(path.parent)


def sets_of_run(config: EvaluateConfig, trained: Trained) -> Sets:
    shape = tuple(trained.data["shape"])
    labels: Tensor | None = None
    if not measures_images(shape):
        raise TrainerError(f"scores need pictures, but the run's samples have shape {shape}")
    settings = trained.config
    floor: Tensor | None = None
    if config.against is not None:
        layout = layout_of(shape, settings.pictures)
        chosen = reals_of(config.against, layout, config.samples, config.seed, config.split)
        real, floor, what = chosen.pictures, chosen.others, chosen.what
        if known := chosen.hashes & trained_on(config.run):
            what += f", of which the run trained on {len(known):,}, which favors a generator that copies them"
    else:
        assert config.run is not None
        try:
            source, held_out = run_data(settings, home_of(config.run), trained.device)
        except DataError as error:
            raise DataError(f"{error} (the run's data; --against PATH takes other pictures)") from error
        if config.training:
            real, labels = some(source, config.samples, config.seed)
            what = f"{len(real):,} pictures that the run trained on, which favors a generator that copies them"
        elif held_out is None or (held_out.size or LEAST) < LEAST:
            raise DataError(
                f"the run holds out {0 if held_out is None else held_out.size} pictures, but scores need {LEAST}: "
                "--against PATH takes other pictures, --training those that it trained on"
            )
        else:
            real, labels = some(held_out, config.samples, config.seed)
            floor, _ = some(source, len(real), config.seed + 1)
            floor = floor if len(floor) == len(real) else None
            what = f"{len(real):,} pictures that the run held out"
    # Samples have the classes of the reals, or of the training data, so that a rare class is as rare among them.
    labels = labels if config.against is None else drawn_labels(trained, config, len(real))
    fake = trained.samples(trained.latents(len(real), config.seed), labels)
    return Sets(fake, real, floor, what)


def some(source: Any, count: int, seed: int) -> tuple[Tensor, Tensor | None]:
    """Return `count` different samples and their labels, or all of them if there are fewer."""
    samples, labels = sample_reals(source, min(count, source.size or count), seed)
    return samples.cpu(), labels


def drawn_labels(trained: Trained, config: EvaluateConfig, count: int) -> Tensor | None:
    """Draw labels (count,) as frequent as in the training data, or return None if they are not known."""
    record = DataRecord.read(home_of(config.run) / "data.json") if config.run is not None else None
    if trained.classes is None or record is None:
        return None
    names = [content.partition(" ")[2] for content in record.pictures.values()]
    shares = torch.tensor([float(names.count(name)) for name in trained.class_names], device="cpu")
    if not shares.sum() > 0:
        return None
    return torch.multinomial(shares, count, True, generator=torch.Generator().manual_seed(config.seed))


def sets_of_folders(config: EvaluateConfig) -> Sets:
    assert config.images is not None
    assert config.against is not None
    if config.image_size is not None:
        height, width = sides(config.image_size, networks=False)
    else:
        height, width = first_size(config.images)
    layout = Layout(height, width, config.crop or "center", config.channels or 3, config.background or "white")
    fake = reals_of(config.images, layout, config.samples, config.seed).pictures
    real = reals_of(config.against, layout, len(fake), config.seed, config.split)
    fake = fake[: len(real.pictures)]
    return Sets(fake, real.pictures, real.others, f"{real.what}, at {width} x {height} pixels")


def layout_of(shape: tuple[int, ...], pictures: PictureConfig) -> Layout:
    crop = "center" if pictures.crop == "random" else pictures.crop
    channels, height, width = shape
    return Layout(height, width, crop, channels, pictures.background)  # type: ignore[arg-type]


def first_size(path: Path) -> tuple[int, int]:
    """Return the height and width of the first picture that can be read."""
    container = open_container(path)
    unreadable = 0
    for entry in container.entries:
        if Path(entry.name).suffix.lower() in endings():
            try:
                with ImageOps.exif_transpose(open_image(container.read(entry.name))) as image:
                    return image.height, image.width
            except UNREADABLE:
                unreadable += 1
    raise DataError(f"{path} contains no pictures" + (f" that can be read, of {unreadable}" if unreadable else ""))


def trained_on(run: Path | None) -> set[str]:
    """Return the hashes of the pictures that a run trained on, as far as its folder lists them."""
    record = DataRecord.read(home_of(run) / "data.json") if run is not None else None
    if record is None:
        return set()
    held_out = set(record.held_out)
    return {content.partition(" ")[0] for name, content in record.pictures.items() if name not in held_out}


class Reals(NamedTuple):
    pictures: Tensor
    others: Tensor | None  # as many
    hashes: set[str]  # of the pictures
    what: str


def reals_of(path: Path, layout: Layout, count: int, seed: int, split: str | None = None) -> Reals:
    """Return at most `count` pictures chosen by `seed`, and as many others if there are enough."""
    found = read_pictures(path, layout, "none", split)
    order = torch.randperm(len(found.images), generator=torch.Generator().manual_seed(seed), device="cpu")
    if len(order) < LEAST:
        raise DataError(f"{path} contains {len(order)} pictures, but scores need at least {LEAST}")
    chosen, others = order[:count], order[count : 2 * count]

    def pixels(index: Tensor) -> Tensor:
        return found.images[index].float().div_(127.5).sub_(1)

    hashes = {found.hashes[row] for row in chosen.tolist()}
    what = f"{len(chosen):,} pictures of {path}" + (f", {found.split}" if found.split else "")
    return Reals(pixels(chosen), pixels(others) if len(others) == len(chosen) else None, hashes, what)


def lines(found: dict[str, Any]) -> list[str]:
    """Return the scores as lines of text."""
    floor: dict[str, float] = found.get("floor", {})
    about = f"features: {found['extractor']}" + (f", sha256 {found['digest']}..." if "digest" in found else "")
    text = [f"{found['n']:,} samples against {found['against']}; {about}"]
    if "note" in found:
        text.append(found["note"])
    for key, value in found.items():
        if isinstance(value, float) and key != "IS-deviation":
            beside = f"   floor {floor[key]:.4g}" if key in floor else ""
            if key == "IS":
                beside = f"   standard deviation {found['IS-deviation']:.3g}"
            text.append(f"  {key:28}{value:10.4g}{beside}")
    if floor:
        text.append("the floor is the score of other real pictures in place of the samples")
    else:
        text.append("there is no floor: too few other real pictures")
    return text
