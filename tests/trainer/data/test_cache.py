from __future__ import annotations

import errno
import gzip
import os
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from fastgan.trainer.data import cache
from fastgan.trainer.data.cache import cache_path, kept, write
from fastgan.trainer.data.image_folder import read_folder
from fastgan.trainer.data.sources import load_source, read_fashion_mnist
from fastgan.trainer.errors import DataError

CPU = torch.device("cpu")
IMAGES = "train-images-idx3-ubyte.gz"


@pytest.fixture
def opened(monkeypatch) -> list[str]:
    """The gzip files that a test opens."""
    names: list[str] = []
    original = gzip.open
    monkeypatch.setattr(gzip, "open", lambda path: names.append(path.name) or original(path))
    return names


@pytest.fixture(params=["no folder", "full disk"])
def no_cache(request, tmp_path, monkeypatch) -> None:
    """Nothing can be written to the cache."""
    if request.param == "no folder":
        (tmp_path / "file").touch()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
        return

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)


def test_fashion_mnist_is_unpacked_once_and_mapped_with_the_same_bits(fashion_mnist_folder, opened, own_cache):
    first = read_fashion_mnist(fashion_mnist_folder)[0]
    again = read_fashion_mnist(fashion_mnist_folder)[0]
    assert opened == [IMAGES]
    assert torch.equal(again, first)
    with gzip.open(fashion_mnist_folder / IMAGES) as file:
        pixels = np.frombuffer(file.read(), np.uint8, offset=16).reshape(40, 28, 28)
    np.testing.assert_array_equal(again[:, 0, 2:30, 2:30], pixels)
    assert int(again.sum()) == int(pixels.sum(dtype=np.int64))  # nothing but zeros around them
    (file,) = (own_cache / "images").iterdir()
    assert file.stat().st_size == 40 * 32 * 32
    again.zero_()  # a mapped tensor is the reader's own
    assert torch.equal(read_fashion_mnist(fashion_mnist_folder)[0], first)


@pytest.mark.parametrize("change", ["pixels", "time"])
def test_another_size_or_time_of_the_source_unpacks_it_again(fashion_mnist_folder, opened, write_idx, change):
    path = fashion_mnist_folder / IMAGES
    read_fashion_mnist(fashion_mnist_folder)
    time = path.stat().st_mtime_ns
    if change == "pixels":
        write_idx(path, np.full((7, 28, 28), 9, np.uint8))
        os.utime(path, ns=(time, time))
    else:
        os.utime(path, ns=(time, time + 1))
    assert len(read_fashion_mnist(fashion_mnist_folder)[0]) == (7 if change == "pixels" else 40)
    assert len(opened) == 2


def test_without_a_cache_the_same_bits_stay_in_memory(fashion_mnist_folder, no_cache, tmp_path, opened):
    batches = [load_source("fashion-mnist", 0, CPU, fashion_mnist_folder).next(16) for _ in range(2)]
    assert torch.equal(*batches)
    assert opened.count(IMAGES) >= 2
    assert not list(tmp_path.rglob("*.partial"))
    assert not list(tmp_path.rglob("*.bytes"))


def test_the_cache_gives_the_batches_that_memory_gives(fashion_mnist_folder, tmp_path, monkeypatch):
    mapped = [load_source("fashion-mnist", 0, CPU, fashion_mnist_folder).next(16) for _ in range(2)]
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    in_memory = load_source("fashion-mnist", 0, CPU, fashion_mnist_folder).next(16)
    assert torch.equal(mapped[0], in_memory)
    assert torch.equal(mapped[1], in_memory)


def test_stacked_images_are_mapped_too(fashion_mnist_folder, write_idx, opened):
    write_idx(fashion_mnist_folder / "train-labels-idx1-ubyte.gz", np.arange(40, dtype=np.uint8) % 10)
    batches = [load_source("stacked", 0, CPU, fashion_mnist_folder).next(16) for _ in range(2)]
    assert torch.equal(*batches)
    assert opened.count(IMAGES) == 1


def test_a_folder_of_pictures_without_a_cache_stays_in_memory(no_cache, tmp_path, capsys):
    (tmp_path / "p").mkdir()
    for i, color in enumerate(["red", "lime"]):
        Image.new("RGB", (40, 40), color).save(tmp_path / "p" / f"{i}.png")
    (tmp_path / "p" / "bad.png").write_text("no picture")
    for _ in range(2):
        images, _ = read_folder(tmp_path / "p", 32)
        assert images.float().mean((2, 3)).tolist() == [[255, 0, 0], [0, 255, 0]]
        assert capsys.readouterr().err.count("skipped bad.png") == 1


def test_a_source_that_is_damaged_leaves_nothing_in_the_cache(fashion_mnist_folder, own_cache):
    (fashion_mnist_folder / IMAGES).write_bytes(b"no gzip")
    with pytest.raises(DataError, match="cannot be read"):
        read_fashion_mnist(fashion_mnist_folder)
    assert not list(own_cache.rglob("*.*"))


def test_no_bytes_make_no_file():
    path = cache_path("none")
    assert len(kept(path, list)) == 0
    assert not path.exists()


def test_writers_at_the_same_time_leave_one_whole_file(monkeypatch):
    path = cache_path("shared")
    barrier = threading.Barrier(2)
    pids = iter((1, 2))  # threads in the place of processes
    monkeypatch.setattr(cache.os, "getpid", lambda: next(pids))

    def parts():
        yield b"a" * 1000
        barrier.wait(10)
        yield b"b" * 1000

    threads = [threading.Thread(target=write, args=(path, parts())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_bytes() == b"a" * 1000 + b"b" * 1000
    assert [file.name for file in path.parent.iterdir()] == [path.name]
