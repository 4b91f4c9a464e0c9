"""The configuration of a training run. `fastgan train PRESET` starts from a preset; every field is a flag.

This module does not import PyTorch, so that `--help` is fast.
"""

from __future__ import annotations

import dataclasses
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

with suppress(ModuleNotFoundError):  # only the command line needs it; it reads the annotations
    import tyro

from fastgan.trainer.checks import require_positive, require_seed, require_threads
from fastgan.trainer.data.options import EMOJI, DatasetName, PictureConfig, refuse_data
from fastgan.trainer.data.size import sides
from fastgan.trainer.errors import RunFolderError
from fastgan.trainer.game.names import AugmentName, Kernels, LossName, OptimizerName, PenaltyName
from fastgan.trainer.settings import checked, flat, merged, read_table

Architecture = Literal["auto", "mlp", "pacgan", "dcgan", "resnet", "residual", "sagan"]
SpectralNorm = Literal["fused", "per-layer", "torch", "none"]
Precision = Literal["float32", "bfloat16", "float16"]
MinibatchStatistic = Literal["none", "stddev", "discrimination"]

# Settings that a resumed run may change: when it stops, where it runs, how often it writes. None changes its results.
NO_RESULTS = {
    *("steps", "minutes", "device", "threads", "data", "runs"),
    *("log_every", "sample_every", "checkpoint_every", "equilibrium_every", "extractor", "scored", "tensorboard"),
    *("score_every", "keep_every"),
}

# Settings that change the results from the resumption on, because no saved state depends on them.
FROM_HERE_ON = (
    *("d_lr", "g_lr", "lr_warmup", "lr_decay", "betas", "d_steps", "accumulate", "penalty_weight", "penalty_every"),
    *("ada_images", "ada_target", "ema_decay", "ema_kimg", "ema_rampup", "freeze_d"),
)

NOT_SAVED = ("resume", "overwrite", "data_changed_ok")  # they belong to one call, not to the run
PICTURES = ("folder", "emoji")  # data sets of pictures of any size

_NEW_NAMES = {"optimiser": "optimizer"}  # old names of settings, as older runs wrote them


@dataclass(frozen=True)
class ModelConfig:
    architecture: Architecture = "auto"  # auto: dcgan for images, mlp for points
    width: int = 32  # images: channels at 16x16, doubled at each halving; points: hidden units
    latent_dim: int = 64  # length of the generator's input
    spectral_norm: SpectralNorm = "fused"  # on the discriminator; torch uses torch.nn.utils.parametrizations
    n_power_iterations: int = 1  # power iterations of spectral norm in each forward pass
    minibatch: MinibatchStatistic = "none"  # minibatch statistic that the discriminator computes
    pack: int = 1  # samples that the discriminator judges together (PacGAN)
    channels_last: bool = False  # use the channels_last memory format for images and networks
    conditional: bool = False  # give the labels to both networks; the data must have labels

    def __post_init__(self) -> None:
        require_positive(self, "width", "latent_dim", "n_power_iterations", "pack")
        if self.conditional and self.pack > 1:
            raise ValueError("conditional and pack exclude each other: a pack has no single label")
        if self.architecture == "residual" and self.spectral_norm != "none":
            raise ValueError(
                "architecture residual starts layers at zero, so their spectral norm is zero: set spectral_norm none"
            )


@dataclass(frozen=True)
class OptimConfig:
    loss: LossName = "hinge"
    penalty: PenaltyName = "none"  # on the discriminator's gradient
    penalty_weight: float = 10.0
    penalty_every: int = 1  # discriminator steps between penalties; each penalty is scaled by this number
    augment: AugmentName = "none"  # augmentation of images before the discriminator
    ada_images: int = 500_000  # images over which ADA's p can rise from 0 to 1; use fewer for short runs on few images
    ada_target: float = 0.6  # target of E[sign D(real)]: ADA augments more above it and less below it
    kernels: Kernels = "fastgan"  # torch computes penalties and statistics with plain PyTorch
    compile: bool = False  # compile the networks' functions with torch.compile (needs a C++ compiler)
    batch_size: int = 64  # total over all ranks
    accumulate: int = 1  # split each rank's batch into this many parts to save memory; statistics are per part
    precision: Precision = "float32"  # bfloat16 and float16 use autocast; float16 also scales gradients
    optimizer: Annotated[OptimizerName, tyro.conf.arg(aliases=["--optimiser"])] = "adam"
    d_lr: float = 4e-4
    g_lr: float = 4e-4
    lr_warmup: int | None = None  # steps over which both learning rates rise linearly from zero
    lr_decay: tuple[int, int] | None = None  # steps from and to which both learning rates fall linearly to zero
    betas: tuple[float, float] = (0.5, 0.999)  # for every variant of Adam
    d_steps: int = 1  # discriminator steps for each generator step
    ema_decay: float = 0.995  # decay of the averaged generator, which makes the samples, in each step
    ema_kimg: float | None = None  # half-life of the average in thousands of images, in place of ema_decay
    ema_rampup: float | None = None  # the half-life is at most this share of the images so far (StyleGAN2: 0.05)
    freeze_d: int = 0  # layers of the discriminator, from the image on, that are not trained; for fine-tuning

    @property
    def average_decay(self) -> float:
        """The decay of the averaged generator in each step."""
        if self.ema_kimg is None:
            return self.ema_decay
        half_life = 1000 * self.ema_kimg / self.batch_size  # steps
        return float(0.5 ** (1 / half_life))

    def __post_init__(self) -> None:
        require_positive(self, "batch_size", "accumulate", "d_lr", "g_lr", "d_steps")
        require_positive(self, "penalty_weight", "penalty_every", "ada_images", "ema_kimg", "ema_rampup")
        require_positive(self, "lr_warmup")
        if self.lr_decay is not None and not 0 <= self.lr_decay[0] < self.lr_decay[1]:
            raise ValueError(f"lr_decay must be two steps, the first before the second, got {self.lr_decay}")
        for value in (*self.betas, self.ema_decay, self.ada_target):
            if not 0 <= value < 1:
                raise ValueError(f"betas, ema_decay and ada_target must lie in [0, 1), got {value}")
        if self.freeze_d < 0:
            raise ValueError(f"freeze_d must not be negative, got {self.freeze_d}")
        if self.compile and self.kernels == "torch":
            raise ValueError("torch.compile cannot compile PyTorch's double backward: compile needs kernels fastgan")
        if self.optimizer == "extra-adam" and self.precision == "float16":
            raise ValueError("extra-adam extrapolates with unscaled gradients: choose precision bfloat16 or float32")
        if self.optimizer == "extra-adam" and self.d_steps != 1:
            raise ValueError(f"extra-adam updates both networks at once: d_steps must be 1, got {self.d_steps}")


@dataclass(frozen=True)
class TrainConfig:
    dataset: DatasetName = "fashion-mnist"  # training data
    name: str = "fashion-mnist"  # name of the run's folder in --runs
    runs: Path = Path("runs")
    data: Path | None = None  # folder or zip with the data; default: $FASTGAN_DATA (IDX), the cache, Debian's folder
    image_size: int | str = 32  # pixels for data without a fixed size (folder, emoji): 128, or 64x192 (height x width)
    steps: int = 20_000  # stop after this many generator steps
    minutes: float | None = None  # stop after this much training time, including earlier sessions, if that is sooner
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = None  # CPU threads; default: PyTorch's choice
    log_every: int = 50
    sample_every: int = 500
    checkpoint_every: int = 1000
    keep_every: int | None = None  # steps between checkpoints that stay; default: only the two newest stay
    equilibrium_every: int | None = 1000  # steps between estimates of the duality gap; each costs about 30 steps
    extractor: str = "random-conv"  # features for the scores; also efficientnet-lite0, FILE.pt or module:callable
    scored: int = 1000  # number of real and of generated images for the scores; at most the held-out tenth
    score_every: int | None = None  # steps between scores; the best generator is kept as best.safetensors
    init_from: Path | None = None  # run, checkpoint or exported generator whose weights to start from (fine-tuning)
    tensorboard: bool = False  # also write metrics and samples for TensorBoard
    resume: bool = False  # continue from the newest checkpoint; flags that are not given keep the run's values
    data_changed_ok: bool = False  # resume although the pictures are not those that the run trained on
    overwrite: bool = False  # replace an existing run with this name
    pictures: PictureConfig = field(default_factory=PictureConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)

    def __post_init__(self) -> None:
        require_seed(self.seed)
        require_threads(self.threads)
        require_positive(self, "steps", "minutes", "log_every", "sample_every", "checkpoint_every")
        require_positive(self, "equilibrium_every", "scored", "score_every", "keep_every")
        sides(self.image_size)
        refuse_data(self.dataset, self.data)
        changed = [*(["image_size"] if self.image_size != 32 else []), *self.pictures.changed()]
        if self.dataset not in PICTURES and changed:
            raise ValueError(
                f"{self.dataset} has samples of a fixed form: leave out {', '.join(changed)} (for "
                f"{' and '.join(PICTURES)} only)"
            )
        if self.dataset == "emoji" and (others := [name for name in changed if name not in EMOJI]):
            raise ValueError(f"emoji are all of one form: leave out {', '.join(others)} (for folder only)")
        if not self.name or Path(self.name).name != self.name:
            raise ValueError(f"name must be a plain folder name, got {self.name!r}")
        parts = self.model.pack * self.optim.accumulate
        if self.optim.batch_size % parts:
            raise ValueError(f"batch_size {self.optim.batch_size} must be a multiple of pack * accumulate, {parts}")
        if self.resume and self.overwrite:
            raise ValueError("resume and overwrite exclude each other")

    @property
    def folder(self) -> Path:
        return self.runs / self.name

    def to_json(self) -> dict[str, Any]:
        values = dataclasses.asdict(self)
        values["runs"] = str(self.runs)
        for key in ("data", "init_from"):
            values[key] = None if values[key] is None else str(values[key])
        for key in ("betas", "lr_decay"):  # as JSON has them
            values["optim"][key] = list(values["optim"][key]) if values["optim"][key] else None
        for key in NOT_SAVED:
            del values[key]
        return values

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> TrainConfig:
        """Build a configuration from a file's values. Those that an older run did not know take their defaults.

        Raises:
            ValueError: a key is unknown, or a value is wrong.
            KeyError: a key is missing.
        """
        values = renewed(values)
        values.pop("class_names", None)  # a run's folder lists them for the reader
        kinds = {"optim": OptimConfig, "model": ModelConfig, "pictures": PictureConfig}
        for key, kind in kinds.items():
            group = values.get(key, {}) if key == "pictures" else values[key]  # older runs had no settings of pictures
            values[key] = kind(**checked(kind, group, (cls, *kinds.values())))
        return cls(**checked(cls, values, tuple(kinds.values())))

    @classmethod
    def load(cls, path: Path, base: TrainConfig | None = None) -> TrainConfig:
        """Read a configuration. With a `base`, the file may contain only some settings."""
        try:
            values = read_table(path)
            return cls.from_json(values if base is None else merged(base.to_json(), renewed(values)))
        except FileNotFoundError:
            raise RunFolderError(f"{path.parent} does not contain a run") from None
        except KeyError as error:
            raise RunFolderError(f"{path} is not a valid configuration: {error} is missing") from error
        except (ValueError, TypeError) as error:
            raise RunFolderError(f"{path} is not a valid configuration: {error}") from error


def renewed(values: dict[str, Any]) -> dict[str, Any]:
    """Return a file's values under the names of today."""
    optim = values.get("optim")
    if not isinstance(optim, dict):
        return dict(values)
    return values | {"optim": {_NEW_NAMES.get(key, key): value for key, value in optim.items()}}


def changes(before: TrainConfig, after: TrainConfig) -> dict[str, list[Any]]:
    """Return the settings that change a run's results and differ, each with both values."""
    old, new = flat(before.to_json()), flat(after.to_json())
    return {key: [old[key], new[key]] for key in old if key not in NO_RESULTS and old[key] != new[key]}


def described(changed: dict[str, list[Any]]) -> str:
    return ", ".join(f"{key}: {before} -> {after}" for key, (before, after) in changed.items())


def refuse_changes(saved: TrainConfig, asked: TrainConfig) -> None:
    """Raise RunFolderError if `asked` has settings that a resumed run cannot change."""
    changed = {key: pair for key, pair in changes(saved, asked).items() if key not in FROM_HERE_ON}
    if changed:
        raise RunFolderError(
            f"cannot resume {asked.folder} with different settings ({described(changed)}): of the settings that change "
            f"the results, only {', '.join(FROM_HERE_ON)} may change; leave them out, or start a new run from its "
            f"weights with --init-from {asked.folder}"
        )


POINT_OPTIM = OptimConfig(loss="non-saturating", batch_size=256, d_lr=2e-3, g_lr=1e-3, ema_decay=0.99)

RESIDUAL = ModelConfig(architecture="residual", spectral_norm="none")
R3GAN = OptimConfig(
    loss="relativistic", penalty="r1+r2", penalty_weight=1.0, batch_size=32, d_lr=2e-4, g_lr=2e-4, betas=(0.0, 0.99)
)
CRITIC = ModelConfig(spectral_norm="none")
WGAN_GP = OptimConfig(loss="wasserstein", penalty="wgan-gp", d_lr=2e-4, g_lr=2e-4, betas=(0.0, 0.9), d_steps=5)

PRESETS: dict[str, tuple[str, TrainConfig]] = {
    "fashion-mnist": ("28x28 photographs of clothes, padded to 32x32; DCGAN.", TrainConfig()),
    "discs": (
        "32x32 soft discs drawn on the fly; needs no data; DCGAN.",
        TrainConfig(dataset="discs", name="discs", steps=2000),
    ),
    "folder": (
        "Pictures of any size from a folder or zip file (--data PATH); residual networks with R1 + R2.",
        TrainConfig(dataset="folder", name="folder", model=RESIDUAL, optim=R3GAN),
    ),
    "emoji": (
        "Noto color emoji at --image-size 32, 64 or 128; residual networks with R1 + R2.",
        TrainConfig(dataset="emoji", name="emoji", model=RESIDUAL, optim=R3GAN),
    ),
    "stacked": (
        "Three photographs of clothes as red, green and blue: 1000 modes; DCGAN.",
        TrainConfig(dataset="stacked", name="stacked"),
    ),
    "waveforms": (
        "Plucked tones of 256 samples drawn on the fly; DCGAN in one dimension, WGAN-GP.",
        TrainConfig(dataset="waveforms", name="waveforms", steps=2000, model=CRITIC, optim=WGAN_GP),
    ),
    "voxels": (
        "16x16x16 balls and boxes drawn on the fly; DCGAN in three dimensions, WGAN-GP.",
        TrainConfig(dataset="voxels", name="voxels", steps=2000, model=CRITIC, optim=WGAN_GP),
    ),
    "ring8": (
        "8 Gaussians on a circle; MLP that judges pairs.",
        TrainConfig(
            dataset="ring8",
            name="ring8",
            steps=3000,
            model=ModelConfig(width=64, latent_dim=16, pack=2),
            optim=POINT_OPTIM,
        ),
    ),
    "grid25": (
        "25 Gaussians on a square grid; MLP that judges pairs.",
        TrainConfig(
            dataset="grid25",
            name="grid25",
            steps=10_000,
            model=ModelConfig(width=128, latent_dim=16, pack=2),
            optim=POINT_OPTIM,
        ),
    ),
}
