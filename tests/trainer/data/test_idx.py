from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from fastgan.trainer.data.idx import read_idx
from fastgan.trainer.errors import DataError


@pytest.mark.parametrize("shape", [(3, 28, 28), (5,), (0, 4)])
def test_reads_back_what_was_written(tmp_path, write_idx, shape):
    array = np.random.default_rng(1).integers(0, 256, shape, np.uint8)
    np.testing.assert_array_equal(read_idx(write_idx(tmp_path / "a.gz", array)), array)


def damaged(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


HEADER = bytes([0, 0, 8, 1, 0, 0, 0, 3])


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (gzip.compress(b"\0\0\x0d\1" + HEADER[4:] + b"abc"), "wrong magic 00000d01"),
        (gzip.compress(b"\x1f"), "wrong magic"),
        (gzip.compress(HEADER + b"ab"), "has 10 bytes, but shape (3,) needs 11"),
        (gzip.compress(HEADER + b"abcd"), "has 12 bytes, but shape (3,) needs 11"),
        (gzip.compress(HEADER[:6]), "header needs 8 bytes, but the file has 6"),
        (gzip.compress(HEADER + bytes(500))[:-9], "truncated"),
        (HEADER + b"abc", "cannot be read"),
        (b"", "wrong magic"),
    ],
    ids=["float type", "no header", "short", "long", "header cut", "gzip cut", "no gzip", "empty"],
)
def test_a_damaged_file_is_named_with_what_is_wrong(tmp_path, content, complaint):
    path = damaged(tmp_path / "images.gz", content)
    with pytest.raises(DataError) as caught:
        read_idx(path)
    assert str(path) in str(caught.value)
    assert complaint in str(caught.value)


def test_a_flipped_bit_in_the_compressed_stream_is_an_error(tmp_path):
    content = bytearray(gzip.compress(HEADER + b"abc"))
    content[-6] ^= 1  # in the checksum
    with pytest.raises(DataError, match="cannot be read"):
        read_idx(damaged(tmp_path / "a.gz", bytes(content)))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.gz"):
        read_idx(tmp_path / "nowhere.gz")
