from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from fontTools.fontBuilder import FontBuilder
from fontTools.ttLib import newTable
from fontTools.ttLib.tables.BitmapGlyphMetrics import SmallGlyphMetrics
from fontTools.ttLib.tables.C_B_D_T_ import cbdt_bitmap_format_17
from fontTools.ttLib.tables.E_B_L_C_ import SbitLineMetrics, Strike, eblc_index_sub_table_1
from PIL import ExifTags, Image, ImageOps

from fastgan import cli
from fastgan.trainer.data.emoji import find_emoji, read_emoji
from fastgan.trainer.data.image_folder import read_folder
from fastgan.trainer.data.pixels import Layout, open_image, pixels_of
from fastgan.trainer.data.sources import Images, load_source
from fastgan.trainer.errors import DataError

CPU = torch.device("cpu")
COLORS = ["red", "lime", "blue", "white"]


@pytest.fixture
def folder(tmp_path) -> Path:
    """Four pictures of different sizes and formats, one color each."""
    folder = tmp_path / "pictures"
    (folder / "below").mkdir(parents=True)
    for color, size, name in zip(
        COLORS, [(40, 40), (64, 33), (20, 90), (300, 200)], ["a.png", "b.jpg", "below/c.webp", "d.JPEG"], strict=True
    ):
        Image.new("RGB", size, color).save(folder / name)
    return folder


def means(images: torch.Tensor) -> list[list[int]]:
    return [[round(value / 255) for value in image.float().mean((1, 2)).tolist()] for image in images]


def test_a_folder_becomes_squares_of_one_size_in_the_order_of_its_names(folder, capsys):
    images, labels = read_folder(folder, 32)
    assert images.shape == (4, 3, 32, 32)
    assert images.dtype == torch.uint8
    assert labels is None
    assert means(images) == [[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1]]
    assert capsys.readouterr().err == ""


def test_the_middle_of_a_long_picture_is_kept_and_transparency_becomes_white(tmp_path):
    (tmp_path / "p").mkdir()
    long = Image.new("RGB", (96, 32), "red")
    long.paste("blue", (32, 0, 64, 32))
    long.save(tmp_path / "p" / "a.png")
    Image.new("RGBA", (32, 32), (255, 0, 0, 0)).save(tmp_path / "p" / "b.png")
    images, _ = read_folder(tmp_path / "p", 32)
    assert means(images) == [[0, 0, 1], [1, 1, 1]]
    assert (images[0, 0] == 0).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_stands_as_the_camera_was_held(tmp_path, orientation):
    corners = Image.new("RGB", (16, 16))
    for i, place in enumerate([(0, 0), (8, 0), (0, 8), (8, 8)]):
        corners.paste((60 * (i + 1),) * 3, (*place, place[0] + 8, place[1] + 8))
    exif = corners.getexif()
    exif[ExifTags.Base.Orientation] = orientation
    corners.save(tmp_path / "a.png", exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / "a.png")))[4::8, 4::8, 0]
    assert (pixels_of(open_image(tmp_path / "a.png"), Layout(16, 16))[0, 4::8, 4::8] == expected).all()


def test_sixteen_bits_keep_their_shades(tmp_path):
    shades = np.array([0, 257 * 40, 257 * 200, 65535], np.uint16).repeat(16)[:, None].repeat(64, 1)
    Image.fromarray(shades).save(tmp_path / "a.png")
    assert pixels_of(open_image(tmp_path / "a.png"), Layout(64, 64))[:, 8::16, 32].tolist() == [[0, 40, 200, 255]] * 3


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_a_damaged_exif_block_is_no_reason_to_leave_a_picture_out(tmp_path):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.jpg", exif=b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12")
    assert pixels_of(open_image(tmp_path / "a.jpg"), Layout(8, 8)).shape == (3, 8, 8)


def test_a_second_reading_is_mapped_from_the_cache_until_a_file_changes(folder, monkeypatch):
    first, _ = read_folder(folder, 32)
    opened = []
    original = Image.open
    monkeypatch.setattr(Image, "open", lambda file: opened.append(file) or original(file))
    again, _ = read_folder(folder, 32)
    assert torch.equal(again, first)
    assert not opened
    Image.new("RGB", (50, 50), "black").save(folder / "a.png")
    changed, _ = read_folder(folder, 32)
    assert len(opened) == 4
    assert means(changed)[0] == [0, 0, 0]


def test_writing_to_a_mapped_image_does_not_change_the_file(folder):
    images, _ = read_folder(folder, 32)
    images.zero_()
    assert means(read_folder(folder, 32)[0])[0] == [1, 0, 0]


def test_folders_in_the_folder_are_labels(folder):
    (folder / "other").mkdir()
    for name in ("a.png", "b.jpg", "d.JPEG"):
        (folder / name).rename(folder / "other" / name)
    _, labels = read_folder(folder, 32)
    assert labels.tolist() == [0, 1, 1, 1]


def png_of(width: int, height: int) -> bytes:
    """A PNG file that claims a size and holds nothing."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def test_bad_files_are_named_and_left_out(folder, capsys):
    (folder / "bomb.png").write_bytes(png_of(60_000, 60_000))
    (folder / "large.png").write_bytes(png_of(11_000, 10_000))
    (folder / "cut.jpg").write_bytes((folder / "d.JPEG").read_bytes()[:200])
    (folder / "text.png").write_text("not a picture")
    (folder / "notes.txt").write_text("no picture's name")
    images, _ = read_folder(folder, 32)
    assert len(images) == 4
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4
    for name in ("bomb.png", "large.png", "cut.jpg", "text.png"):
        assert sum(f"skipped {name}: " in line for line in lines) == 1
    assert not list((folder.parent / "cache").rglob("*.partial"))


@pytest.mark.parametrize("count", [0, 1])
def test_a_folder_with_fewer_than_two_pictures_is_one_line(folder, count, capsys):
    for name in ["a.png", "b.jpg", "below/c.webp", "d.JPEG"][count:]:
        (folder / name).unlink()
    assert cli.main(["train", "folder", "--data", str(folder), "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert f"contains {count} readable images" in error
    assert error.count("\n") == 1


def test_a_missing_folder_and_no_folder_are_one_line_each(tmp_path, capsys):
    assert cli.main(["train", "folder", "--data", str(tmp_path / "nowhere"), "--device", "cpu"]) == 2
    assert "nowhere cannot be read" in capsys.readouterr().err
    assert cli.main(["train", "folder", "--device", "cpu"]) == 2
    assert "--data PATH" in capsys.readouterr().err


def test_a_split_shares_the_pixels_and_keeps_images_with_their_labels(folder):
    pixels = torch.arange(20, dtype=torch.uint8)[:, None, None, None].expand(20, 3, 1, 1).contiguous()
    source = Images(pixels, 0, CPU, torch.arange(20))
    taken = source.split(6, 1)
    assert (source.size, taken.size) == (14, 6)
    assert source.images.data_ptr() == taken.images.data_ptr() == pixels.data_ptr()
    seen = []
    for part in (source, taken):
        images, labels = part.next_labeled(part.size)
        assert ((images[:, 0, 0, 0] + 1) * 127.5).round().long().tolist() == labels.tolist()
        seen += labels.tolist()
    assert sorted(seen) == list(range(20))


def color_font(path: Path, colors: list[str]) -> Path:
    """A font of color bitmaps of 136x128, one glyph a color; the first color is there twice."""
    names = [".notdef", *(f"g{i}" for i in range(len(colors) + 1))]
    builder = FontBuilder(1024, isTTF=True)
    builder.setupGlyphOrder(names)
    builder.setupCharacterMap({0x41 + i: name for i, name in enumerate(names[1:])})
    builder.setupHorizontalMetrics(dict.fromkeys(names, (1024, 0)))
    builder.setupHorizontalHeader()
    builder.setupPost()
    font = builder.font

    strike, data = Strike(), {}
    table = strike.bitmapSizeTable
    table.__dict__.update(colorRef=0, ppemX=109, ppemY=109, bitDepth=32, flags=1)
    for line in ("hori", "vert"):
        metrics = SbitLineMetrics()
        fields = "ascender descender widthMax caretSlopeNumerator caretSlopeDenominator caretOffset minOriginSB"
        fields += " minAdvanceSB maxBeforeBL minAfterBL pad1 pad2"
        metrics.__dict__.update(dict.fromkeys(fields.split(), 0))
        setattr(table, line, metrics)
    index = eblc_index_sub_table_1(b"", font)
    index.names, index.indexFormat, index.imageFormat = names[1:], 1, 17
    strike.indexSubTables.append(index)
    for name, color in zip(names[1:], [*colors, colors[0]], strict=True):
        stored = io.BytesIO()
        Image.new("RGB", (136, 128), color).save(stored, "png")
        glyph = cbdt_bitmap_format_17(b"", font)
        glyph.imageData, glyph.metrics = stored.getvalue(), SmallGlyphMetrics()
        glyph.metrics.__dict__.update(height=128, width=136, BearingX=0, BearingY=0, Advance=136)
        data[name] = glyph
    for tag in ("CBDT", "CBLC"):
        font[tag] = newTable(tag)
        font[tag].version = 3.0
    font["CBLC"].strikes, font["CBDT"].strikeData = [strike], [data]
    font.save(path)
    return path


def test_emoji_are_the_different_bitmaps_of_the_font_on_white_squares(tmp_path):
    font = color_font(tmp_path / "NotoColorEmoji.ttf", ["red", "blue", "lime"])
    images = read_emoji(font, 64)
    assert images.shape == (3, 3, 64, 64)
    middle = images[:, :, 16:48].float().mean((2, 3)) / 255
    assert middle.round().tolist() == [[1, 0, 0], [0, 0, 1], [0, 1, 0]]
    assert (images[:, :, 0] > 250).all()  # the picture is 136 wide and 128 high
    source = load_source("emoji", 0, CPU, tmp_path, 64)
    assert source.next(3).shape == (3, 3, 64, 64)


def test_a_font_that_is_missing_or_has_no_bitmaps_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("fastgan.trainer.data.emoji.DEBIAN_FOLDER", tmp_path / "debian")
    with pytest.raises(DataError, match=r"noto-emoji\.sh"):
        find_emoji()
    (tmp_path / "NotoColorEmoji.ttf").write_text("no font")
    with pytest.raises(DataError, match="cannot be read"):
        read_emoji(tmp_path / "NotoColorEmoji.ttf", 32)
    builder = FontBuilder(1024, isTTF=True)
    builder.setupGlyphOrder([".notdef"])
    builder.font.save(tmp_path / "plain.ttf")
    with pytest.raises(DataError, match="no color bitmaps"):
        read_emoji(tmp_path / "plain.ttf", 32)


def test_stacked_images_are_three_classes_as_colors(tmp_path, write_idx):
    import numpy as np

    images = np.repeat(np.arange(10, dtype=np.uint8) * 20, 3)[:, None, None] * np.ones((1, 28, 28), np.uint8)
    labels = np.repeat(np.arange(10, dtype=np.uint8), 3)
    write_idx(tmp_path / "train-images-idx3-ubyte.gz", images)
    with pytest.raises(DataError, match="need the labels"):
        load_source("stacked", 0, CPU, tmp_path)
    write_idx(tmp_path / "train-labels-idx1-ubyte.gz", labels)
    source = load_source("stacked", 0, CPU, tmp_path)
    x, mode = source.next_labeled(500)
    assert x.shape == (500, 3, 32, 32)
    digits = ((x[:, :, 16, 16] + 1) * 127.5 / 20).round().long()
    assert torch.equal(mode, (digits * torch.tensor([100, 10, 1])).sum(1))
    assert len(mode.unique()) > 300


def test_waveforms_have_the_pitch_of_their_octave_and_die_away():
    x, octave = load_source("waveforms", 0, CPU).next_labeled(256)
    assert x.shape == (256, 1, 256)
    assert x.abs().max() <= 1
    spectrum = torch.fft.rfft(x[:, 0]).abs()
    cycles = spectrum.argmax(1)
    assert ((cycles >= 7.5 + 0 * cycles) == (octave == 1)).float().mean() > 0.9
    energy = x.square()
    assert (energy[:, 0, 16:80].mean(1) > energy[:, 0, 192:].mean(1)).all()


def test_voxels_are_balls_and_boxes_inside_the_cube():
    x, kind = load_source("voxels", 0, CPU).next_labeled(64)
    assert x.shape == (64, 1, 16, 16, 16)
    assert x[:, :, 0].max() < 0
    assert x.amax((1, 2, 3, 4)).min() > 0.9
    filled = (x > 0).float().mean((1, 2, 3, 4))
    assert filled[kind == 1].mean() > 1.3 * filled[kind == 0].mean()  # 6 / pi, apart from soft edges


@pytest.mark.parametrize("dataset", ["waveforms", "voxels"])
def test_a_toy_goes_on_where_its_state_was_taken(dataset):
    source, other = load_source(dataset, 5, CPU), load_source(dataset, 6, CPU)
    source.next(3)
    other.load_state_dict(source.state_dict())
    assert torch.equal(other.next(4), source.next(4))
