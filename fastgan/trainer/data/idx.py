"""The IDX format of MNIST and similar data: two zero bytes, a type, the number of axes, their sizes, the values."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fastgan.trainer.errors import DataError, reason

UNSIGNED_BYTE = 0x08


def read_idx(path: Path) -> npt.NDArray[np.uint8]:
    """Read a gzip-compressed IDX file of unsigned bytes.

    Raises:
        DataError: the file is missing, not a gzip file, truncated, or inconsistent with its header.
    """
    try:
        with gzip.open(path) as file:
            content = file.read()
    except EOFError:
        raise DataError(f"{path} is truncated: its gzip stream ends early") from None
    except (OSError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {reason(error)}") from error

    if len(content) < 4 or content[:2] != b"\0\0" or content[2] != UNSIGNED_BYTE:
        raise DataError(f"{path} has the wrong magic {content[:4].hex()}, expected 000008 and a number of axes")
    axes = content[3]
    start = 4 + 4 * axes
    if len(content) < start:
        raise DataError(f"{path} is truncated: its header needs {start} bytes, but the file has {len(content)}")
    shape = struct.unpack(f">{axes}I", content[4:start])
    wanted = start + math.prod(shape)
    if len(content) != wanted:
        raise DataError(f"{path} has {len(content)} bytes, but shape {shape} needs {wanted}")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)
