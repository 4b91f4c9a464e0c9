"""Data that users have and tests tend to forget: links, sizes, empty classes, zip files among pictures."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from fastgan.trainer.data.containers import open_container
from fastgan.trainer.data.image_folder import read_pictures
from fastgan.trainer.data.pixels import Layout, pixels_of
from fastgan.trainer.errors import DataError

SQUARE = Layout(16, 16)


def picture(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 20), "red").save(path)
    return path


def names_in(path: Path) -> list[str]:
    return [entry.name for entry in open_container(path).entries]


def test_a_link_to_a_parent_adds_nothing(tmp_path):
    data = tmp_path / "all" / "photos" / "d"
    picture(data / "cat" / "1.png")
    picture(data.parent / "other" / "2.png")
    for name, target in (("up", ".."), ("top", "../.."), ("self", "."), ("absolute", data.parent)):
        (data / name).symlink_to(target)
    assert names_in(data) == ["cat/1.png"]


def test_a_folder_that_two_links_lead_to_is_read_once(tmp_path):
    picture(tmp_path / "elsewhere" / "inner" / "1.png")
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a").symlink_to(tmp_path / "elsewhere" / "inner")
    (tmp_path / "d" / "b").symlink_to(tmp_path / "elsewhere")  # contains the first one
    (tmp_path / "d" / "dangling").symlink_to("nowhere")
    assert names_in(tmp_path / "d") == ["a/1.png"]


def test_every_picture_size_fits_every_layout():
    """The box that is cut out may exceed the picture by a rounding error, which Pillow refuses."""
    layouts = [Layout(height, width) for height, width in ((48, 97), (16, 40), (64, 192), (77, 31))]
    for width in range(1, 60):
        image = Image.new("RGB", (width, 61 - width))
        for layout in layouts:
            assert pixels_of(image, layout).shape == (3, layout.height, layout.width)


def test_a_class_without_readable_pictures_is_no_class(tmp_path):
    for name in ("ant/1.png", "bee/2.png", "cat/3.png"):
        picture(tmp_path / "d" / name)
    (tmp_path / "d" / "bee" / "2.png").write_text("no picture")
    for _ in range(2):  # also from the cache
        found = read_pictures(tmp_path / "d", SQUARE)
        assert found.labels.tolist() == [0, 1]
        assert found.class_names == ["ant", "cat"]
        assert found.notes[-1] == "2 classes from folder names: ant, cat; no pictures of bee"


def test_classes_of_dataset_json_without_pictures_are_no_classes(tmp_path):
    for name in ("1.png", "2.png"):
        picture(tmp_path / "d" / name)
    labels = [["1.png", 5], ["2.png", 9], ["removed.png", 7]]
    (tmp_path / "d" / "dataset.json").write_text(json.dumps({"labels": labels}))
    found = read_pictures(tmp_path / "d", SQUARE)
    assert found.labels.tolist() == [0, 1]
    assert found.class_names == ["5", "9"]
    assert found.notes[-1].endswith("; no pictures of 7")


@pytest.mark.parametrize("inside", ["folder", "zip"])
def test_a_zip_file_among_the_data_is_named_with_what_to_do(tmp_path, inside):
    folder = tmp_path / "my data"
    picture(folder / "1.png")
    with zipfile.ZipFile(folder / "more.zip", "w") as archive:
        archive.write(folder / "1.png", "1.png")
    (folder / "1.png").unlink()
    path, how = folder, f"--data '{folder}/more.zip' reads it"
    if inside == "zip":
        path, how = tmp_path / "outer.zip", "unpack it"
        with zipfile.ZipFile(path, "w") as archive:
            archive.write(folder / "more.zip", "more.zip")
    with pytest.raises(DataError) as caught:
        read_pictures(path, SQUARE)
    assert str(caught.value).endswith(f"at least 2 are needed; more.zip is a zip file: {how}")


def test_a_damaged_dataset_json_in_a_zip_file_is_one_line(tmp_path):
    picture(tmp_path / "1.png")
    path = tmp_path / "d.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("1.png", "2.png"):
            archive.write(tmp_path / "1.png", name)
        archive.writestr("dataset.json", '{"labels": [["1.png", 0], ["2.png", 1]]}')
    content = bytearray(path.read_bytes())
    content[content.rindex(b"labels")] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"dataset\.json cannot be read \(Bad CRC-32.*\): --labels none leaves it out"):
        read_pictures(path, SQUARE)
    assert len(read_pictures(path, SQUARE, "none").names) == 2


def test_reasons_are_words_without_numbers_and_paths(tmp_path, capsys):
    for name in ("1.png", "2.png"):
        picture(tmp_path / "d" / name)
    gone = picture(tmp_path / "d" / "3.png")
    container = open_container(tmp_path / "d")
    gone.unlink()  # between the listing and the reading
    (tmp_path / "d" / "3.png").mkdir()
    with pytest.raises(OSError, match="Is a directory"):
        container.read("3.png")
    with pytest.raises(DataError, match=r"nowhere cannot be read: No such file or directory$"):
        open_container(tmp_path / "nowhere")


def test_a_file_that_the_system_refuses_is_read_once_it_may_be(tmp_path, monkeypatch, capsys):
    """Permissions are not in the cache's key."""
    for name in ("1.png", "2.png", "3.png"):
        picture(tmp_path / "d" / name)
    (tmp_path / "d" / "4.png").write_text("no picture")
    read = Path.read_bytes

    def refuse(path: Path) -> bytes:
        if path.name == "3.png":
            raise PermissionError(13, "Permission denied", str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)  # root may read everything
    assert read_pictures(tmp_path / "d", SQUARE).skipped[0] == "3.png: Permission denied"
    monkeypatch.setattr(Path, "read_bytes", read)
    assert read_pictures(tmp_path / "d", SQUARE).names == ["1.png", "2.png", "3.png"]
    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert len(read_pictures(tmp_path / "d", SQUARE).names) == 3  # from the cache


def test_many_pictures_are_announced_and_counted(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("fastgan.trainer.data.image_folder.MANY", 3)
    for name in ("1.png", "2.png", "3.png"):
        picture(tmp_path / "d" / name)
    read_pictures(tmp_path / "d", SQUARE)
    told = capsys.readouterr()
    assert told.out == "reading 3 pictures; later runs take them from the cache\n"
    assert "3/3" in told.err
    read_pictures(tmp_path / "d", SQUARE)
    assert capsys.readouterr() == ("", "")


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path, monkeypatch, capsys):
    for name in ("1.png", "2.png"):
        picture(tmp_path / "d" / name)
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(read_pictures(tmp_path / "d", SQUARE).images) == 2
    assert (
        capsys.readouterr().err
        == f"fastgan: no cache, {tmp_path}/file/fastgan/images cannot be written to: Not a directory\n"
    )


@pytest.mark.skipif(os.name != "posix", reason="links need a right on Windows")
def test_links_that_lead_nowhere_are_named_and_stop_nothing(tmp_path, capsys):
    for name in ("a.png", "b.png"):
        picture(tmp_path / name)
    (tmp_path / "c.png").symlink_to("missing.png")
    (tmp_path / "disk").symlink_to(tmp_path / "unmounted")
    (tmp_path / "round").symlink_to("round")
    found = read_pictures(tmp_path, SQUARE)
    assert found.names == ["a.png", "b.png"]
    assert found.skipped[:2] == ["c.png: the link leads nowhere", "disk: the link leads nowhere"]
    assert found.skipped[2].startswith("round: Too many levels")
    assert "fastgan: skipped disk: the link leads nowhere" in capsys.readouterr().err
    (tmp_path / "a.png").unlink()
    (tmp_path / "b.png").unlink()
    with pytest.raises(DataError, match=r"0 readable images.*; c\.png: the link leads nowhere"):
        read_pictures(tmp_path, SQUARE)


def test_a_picture_or_another_archive_is_no_data(tmp_path):
    for path in (picture(tmp_path / "one.png"), tmp_path / "data.tar.gz"):
        path.touch()
        with pytest.raises(DataError, match=f"{path.name} must be a folder or a zip file of pictures, and is neither"):
            read_pictures(path, SQUARE)
    (tmp_path / "cut.zip").write_bytes(b"PK")
    with pytest.raises(DataError, match=r"cut.zip cannot be read as a zip file"):
        read_pictures(tmp_path / "cut.zip", SQUARE)


def test_folders_in_a_zip_file_of_windows_are_folders(tmp_path):
    with zipfile.ZipFile(tmp_path / "d.zip", "w") as archive:
        for name in ("photos\\cat\\1.png", "photos\\dog\\2.png"):
            archive.write(picture(tmp_path / "1.png"), name)
    found = read_pictures(tmp_path / "d.zip", SQUARE)
    assert found.names == ["photos/cat/1.png", "photos/dog/2.png"]
    assert found.class_names == ["cat", "dog"]


def test_an_encrypted_zip_file_is_one_line(tmp_path, capsys):
    with zipfile.ZipFile(tmp_path / "d.zip", "w") as archive:
        archive.write(picture(tmp_path / "1.png"), "1.png")
    content = bytearray((tmp_path / "d.zip").read_bytes())
    content[content.index(b"PK\1\2") + 8] |= 1  # the flag of encryption in the list of members
    (tmp_path / "d.zip").write_bytes(content)
    with pytest.raises(DataError, match="contains 0 readable images"):
        read_pictures(tmp_path / "d.zip", SQUARE)
    assert capsys.readouterr().err == "fastgan: skipped 1.png: it is encrypted, unpack the zip file first\n"
