from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fastgan.trainer.data.idx import read_idx
from fastgan.trainer.data.sources import Images, fashion_mnist, find_fashion_mnist, load_source
from fastgan.trainer.errors import DataError

CPU = torch.device("cpu")


def test_ring8_has_unit_radius_eight_equal_modes_and_sigma_one_hundredth():
    source = load_source("ring8", 0, CPU)
    x = source.next(40_000)
    distance = torch.cdist(x, source.modes)
    nearest = distance.argmin(1)
    offset = x - source.modes[nearest]
    assert torch.allclose(source.modes.norm(dim=1), torch.ones(8))
    neighbors = torch.cdist(source.modes, source.modes).fill_diagonal_(9).min(1).values
    assert torch.allclose(neighbors, torch.full((8,), 2 * math.sin(math.pi / 8)))
    # Standard errors: sigma / sqrt(2 * 80000) = 2.5e-5, and sqrt(1/8 * 7/8 / 40000) = 1.7e-3; six of each.
    assert abs(float(offset.std()) - 0.01) < 1.5e-4
    assert (nearest.bincount(minlength=8) / 40_000 - 1 / 8).abs().max() < 1e-2


def test_grid25_has_modes_on_the_even_grid_and_sigma_one_twentieth():
    source = load_source("grid25", 0, CPU)
    x = source.next(40_000)
    on_grid = (x / 2).round() * 2
    assert {tuple(mode) for mode in on_grid.tolist()} == {
        (a, b) for a in (-4.0, -2.0, 0.0, 2.0, 4.0) for b in (-4.0, -2.0, 0.0, 2.0, 4.0)
    }
    assert abs(float((x - on_grid).std()) - 0.05) < 7.5e-4


def test_discs_are_dark_at_the_border_bright_inside_and_all_different():
    images = load_source("discs", 0, CPU).next(64)
    assert images.shape == (64, 1, 32, 32)
    assert images[:, :, 0].max() < -0.9
    assert images.amax((1, 2, 3)).min() > 0.9
    assert torch.pdist(images.flatten(1)).min() > 0.1


def test_fashion_mnist_is_padded_with_black_and_scaled(fashion_mnist_folder):
    source = fashion_mnist(0, CPU, fashion_mnist_folder)
    pixels = read_idx(fashion_mnist_folder / "train-images-idx3-ubyte.gz")
    batch = torch.cat([source.next(20), source.next(20)])
    assert batch.shape == (40, 1, 32, 32)
    inner = batch[:, 0, 2:30, 2:30]
    border = batch.clone()
    border[:, :, 2:30, 2:30] = -1
    assert (border == -1).all()
    values = ((inner + 1) * 127.5).round().to(torch.uint8)
    assert sorted(image.tobytes() for image in values.numpy()) == sorted(image.tobytes() for image in pixels)


def test_an_epoch_visits_every_image_once_and_the_next_one_in_another_order():
    images = torch.arange(32, dtype=torch.uint8)[:, None, None, None]
    source = Images(images, 0, CPU)

    def epoch() -> list[int]:
        values = [((source.next(8) + 1) * 127.5).round().flatten().tolist() for _ in range(4)]
        return [int(value) for batch in values for value in batch]

    first, second = epoch(), epoch()
    assert sorted(first) == sorted(second) == list(range(32))
    assert first != second


@pytest.mark.parametrize("dataset", ["fashion-mnist", "discs", "ring8", "grid25"])
@pytest.mark.parametrize("batches", [0, 1, 3, 7])
def test_a_source_goes_on_where_its_state_was_taken(dataset, batches, fashion_mnist_folder):
    source = load_source(dataset, 5, CPU, fashion_mnist_folder)  # 40 images: epochs end within the test
    for _ in range(batches):
        source.next(16)
    state = source.state_dict()
    wanted = [source.next(16) for _ in range(5)]
    other = load_source(dataset, 6, CPU, fashion_mnist_folder)
    other.load_state_dict(state)
    assert all(torch.equal(other.next(16), batch) for batch in wanted)


def test_a_batch_larger_than_the_data_is_refused(fashion_mnist_folder):
    with pytest.raises(DataError, match="batch of 41"):
        fashion_mnist(0, CPU, fashion_mnist_folder).next(41)


def test_images_of_another_size_are_refused(tmp_path, write_idx):
    write_idx(tmp_path / "train-images-idx3-ubyte.gz", np.zeros((2, 32, 32), np.uint8))
    with pytest.raises(DataError, match=r"\(2, 32, 32\), expected \(N, 28, 28\)"):
        fashion_mnist(0, CPU, tmp_path)


class TestWhereFashionMnistIsLookedFor:
    @pytest.fixture(autouse=True)
    def nothing_installed(self, tmp_path, monkeypatch):
        monkeypatch.delenv("FASTGAN_DATA", raising=False)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.setattr("fastgan.trainer.data.sources.DEBIAN_FOLDER", tmp_path / "debian")

    def place(self, folder):
        folder.mkdir(parents=True)
        (folder / "train-images-idx3-ubyte.gz").touch()
        return folder

    def test_the_order_is_flag_environment_cache_debian(self, tmp_path, monkeypatch):
        debian = self.place(tmp_path / "debian")
        assert find_fashion_mnist() == debian
        cache = self.place(tmp_path / "cache" / "fastgan" / "fashion-mnist")
        assert find_fashion_mnist() == cache
        environment = self.place(tmp_path / "environment")
        monkeypatch.setenv("FASTGAN_DATA", str(environment))
        assert find_fashion_mnist() == environment
        assert find_fashion_mnist(cache) == cache

    def test_without_data_the_error_names_every_way_to_give_it(self):
        with pytest.raises(DataError) as caught:
            find_fashion_mnist()
        for way in ("--data", "FASTGAN_DATA", "make data", "dataset-fashion-mnist"):
            assert way in str(caught.value)

    def test_a_named_folder_without_the_file_is_an_error_although_the_cache_has_it(self, tmp_path, monkeypatch):
        self.place(tmp_path / "cache" / "fastgan" / "fashion-mnist")
        monkeypatch.setenv("FASTGAN_DATA", str(tmp_path / "elsewhere"))
        with pytest.raises(DataError, match="elsewhere"):
            find_fashion_mnist()
