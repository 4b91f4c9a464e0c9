"""Writes a run's records for TensorBoard, in addition to its own files. This module needs the package tensorboard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from fastgan.trainer.measure.alarms import describe


class Board:
    """Writes into `folder`. Events that an earlier process wrote for steps after `step` are discarded."""

    def __init__(self, folder: Path, step: int) -> None:
        self.writer = SummaryWriter(str(folder), purge_step=step + 1)

    def write(self, record: dict[str, Any]) -> None:
        """Write every number of a record under its name, and numbers of a nested table under both names."""
        if "step" not in record:
            return
        step = record["step"]
        if "alarm" in record:
            self.writer.add_text("alarms", describe(record), step)
            return
        for key, value in record.items():
            table = value if isinstance(value, dict) else {None: value}
            for name, number in table.items():
                if key != "step":
                    self.writer.add_scalar(key if name is None else f"{key}/{name}", number, step)

    def draw(self, name: str, picture: Path, step: int) -> None:
        pixels = np.asarray(Image.open(picture).convert("RGB"))  # (H, W, 3)
        self.writer.add_image(name, pixels, step, dataformats="HWC")

    def flush(self) -> None:
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()
