"""Names of data sets, and how pictures are read. This module does not import PyTorch."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

DatasetName = Literal["fashion-mnist", "stacked", "folder", "emoji", "discs", "waveforms", "voxels", "ring8", "grid25"]
DRAWN = ("discs", "waveforms", "voxels", "ring8", "grid25")  # data sets that are computed and read no files
EMOJI = ("image_size", "channels", "mirror")  # settings that apply to emoji
Crop = Literal["center", "none", "random"]
Channels = Literal[1, 3, 4]
LabelRule = Literal["auto", "folders", "json", "none"]


@dataclass(frozen=True)
class PictureConfig:
    crop: Crop = "center"  # none changes the proportions; random draws another window each time, of 8/9 of each side
    channels: Channels = 3  # 1: gray, 4: with the alpha channel
    background: str = "white"  # color under transparent parts, if alpha is not kept
    mirror: bool = False  # show half of the pictures mirrored, other ones in each epoch
    labels: LabelRule = "auto"  # auto: dataset.json, else a folder for each class, else none
    split: str | None = None  # folder of the split to use, such as val; default: train if the data has splits

    def changed(self) -> list[str]:
        """Return the names of the settings that are not the default."""
        usual = PictureConfig()
        return [field.name for field in fields(self) if getattr(self, field.name) != getattr(usual, field.name)]


def refuse_data(dataset: str, data: object) -> None:
    """Raise ValueError if a path is given for a data set that is computed."""
    if dataset in DRAWN and data is not None:
        raise ValueError(f"{dataset} is computed and reads no files: leave out data, or choose folder for pictures")
