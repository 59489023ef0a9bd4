"""Portraits in all formats decode to the same picture, or raise an error with the reason."""

import os
import struct
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.family import UPRIGHT
from turbotalk_core.conditioning.reference import (
    NoPictureError,
    References,
    prepare_reference,
    read_image,
    reference_clip,
)
from turbotalk_core.errors import GeometryError, ImageError
from turbotalk_core.hdr import HLG, PQ, tone_map

RED, BLUE = (255, 0, 0), (0, 0, 255)


def _two_colours() -> Image.Image:
    """Picture with red on the left, blue on the right, 40 x 24."""
    image = Image.new("RGB", (40, 24), RED)
    image.paste(BLUE, (20, 0, 40, 24))
    return image


def _corner(image_HWC: torch.Tensor, row: int, column: int) -> list[float]:
    return image_HWC[row, column].tolist()


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "webp"])
def test_a_lossless_file_is_read_exactly(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"portrait.{suffix}"
    _two_colours().save(path, lossless=True)  # heard by WebP alone
    image_HWC = read_image(path)
    expected = torch.from_numpy(np.array(_two_colours())).float() / 255
    assert image_HWC.dtype == torch.float32
    assert torch.equal(image_HWC, expected)


def test_exif_rotation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    _two_colours().save(tmp_path / "turned.png", exif=exif)
    image_HWC = read_image(tmp_path / "turned.png")
    assert image_HWC.shape == (40, 24, 3)
    assert _corner(image_HWC, 0, 0) == [1, 0, 0]
    assert _corner(image_HWC, -1, 0) == [0, 0, 1]


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK"])
def test_other_colour_modes_become_rgb(tmp_path: Path, mode: str) -> None:
    image = Image.new("L", (20, 20), 255)
    image.paste(0, (10, 0, 20, 20))
    image.convert(mode).save(tmp_path / "portrait.tiff")
    image_HWC = read_image(tmp_path / "portrait.tiff")
    assert image_HWC.shape == (20, 20, 3)
    assert _corner(image_HWC, 0, 0) == [1, 1, 1]
    assert _corner(image_HWC, 0, -1) == [0, 0, 0]


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_sixteen_bit_grey_keeps_its_range(tmp_path: Path, suffix: str) -> None:
    levels = np.linspace(0, 65535, 20, dtype=np.uint16).repeat(20).reshape(20, 20)
    Image.fromarray(levels).save(tmp_path / f"deep.{suffix}")
    image_HWC = read_image(tmp_path / f"deep.{suffix}")
    expected = torch.from_numpy(levels.astype(np.float32) / 65535)
    for channel in range(3):
        torch.testing.assert_close(image_HWC[..., channel], expected)


def test_transparency_is_put_on_white(tmp_path: Path) -> None:
    image = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    image.paste((*RED, 255), (0, 0, 16, 32))
    image.save(tmp_path / "cut_out.png")
    reference = prepare_reference(read_image(tmp_path / "cut_out.png"), 32, 32)
    assert reference[0, :, 0, 0].tolist() == [1, -1, -1]
    assert reference[0, :, 0, -1].tolist() == [1, 1, 1]


def test_a_transparent_palette_is_put_on_white(tmp_path: Path) -> None:
    image = Image.new("P", (32, 32), 0)
    image.putpalette([0, 0, 0, *RED])
    image.paste(1, (0, 0, 16, 32))
    image.save(tmp_path / "palette.png", transparency=0)
    reference = prepare_reference(read_image(tmp_path / "palette.png"), 32, 32)
    assert reference[0, :, 0, 0].tolist() == [1, -1, -1]
    assert reference[0, :, 0, -1].tolist() == [1, 1, 1]


def test_of_an_animation_the_first_picture_is_taken(tmp_path: Path) -> None:
    pictures = [Image.new("RGB", (20, 20), colour) for colour in (RED, BLUE)]
    pictures[0].save(tmp_path / "moving.png", save_all=True, append_images=pictures[1:])
    assert _corner(read_image(tmp_path / "moving.png"), 0, 0) == [1, 0, 0]


def test_floating_point_files_are_refused(tmp_path: Path) -> None:
    Image.new("F", (20, 20), 0.5).save(tmp_path / "float.tiff")
    with pytest.raises(ImageError, match=r"floating-point pixels.*save it as PNG"):
        read_image(tmp_path / "float.tiff")


def test_what_is_no_picture_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("not a picture")
    _two_colours().save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.png").touch()
    for name in ("text.png", "cut.png", "empty.png", "missing.png", "."):
        with pytest.raises(ImageError, match=r"cannot read a picture from .*give a PNG"):
            read_image(tmp_path / name)


@pytest.mark.parametrize("name", ["a\0b.png", "a" * 300, "pipe", "/dev/zero"])
def test_what_is_no_file_is_not_opened(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ImageError, match="no such file"):
        read_image(tmp_path / name)


@pytest.mark.parametrize("suffix", ["eps", "psd", "xpm"])
def test_formats_that_are_programs_or_rare_are_not_opened(tmp_path: Path, suffix: str) -> None:
    begin = {
        "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n",
        "psd": b"8BPS\0\1" + bytes(6) + b"\0\3\0\0\0\x20\0\0\0\x20\0\x08\0\3" + bytes(64),
        "xpm": b'/* XPM */\nstatic char *x[] = {\n"20 20 1 1",\n"a c #ff0000",\n' + b'"aa"\n' * 9,
    }
    path = tmp_path / f"picture.{suffix}"
    path.write_bytes(begin[suffix])
    with Image.open(path) as opened:
        assert (opened.format or "").lower() == suffix
    with pytest.raises(ImageError, match="cannot identify image file"):
        read_image(path)


def test_a_picture_of_more_pixels_than_any_is_not_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _two_colours().save(tmp_path / "picture.png")
    monkeypatch.setattr("turbotalk_core.conditioning.reference.MAX_PIXELS", 40 * 24)
    assert read_image(tmp_path / "picture.png").shape == (24, 40, 3)
    monkeypatch.setattr("turbotalk_core.conditioning.reference.MAX_PIXELS", 40 * 24 - 1)
    with pytest.raises(ImageError, match="40x24 are over 959 pixels"):
        read_image(tmp_path / "picture.png")


def test_a_strip_is_not_enlarged() -> None:
    with pytest.raises(GeometryError, match="cut it to the shape of the video"):
        prepare_reference(torch.zeros(16, 16_400, 3), 32, 32)


@given(
    rows=st.integers(16, 80),
    columns=st.integers(16, 80),
    height=st.integers(1, 6).map(lambda tokens: 16 * tokens),
    width=st.integers(1, 6).map(lambda tokens: 16 * tokens),
)
def test_any_picture_fills_any_video(rows: int, columns: int, height: int, width: int) -> None:
    reference = prepare_reference(torch.full((rows, columns, 3), 0.75), height, width)
    assert reference.shape == (1, 3, height, width)
    torch.testing.assert_close(reference, torch.full_like(reference, 0.5))


def test_the_right_size_is_not_touched() -> None:
    image_HWC = torch.rand(32, 48, 3, generator=torch.Generator().manual_seed(0))
    reference = prepare_reference(image_HWC, 32, 48)
    torch.testing.assert_close((reference[0].permute(1, 2, 0) + 1) / 2, image_HWC)


def test_the_centre_is_kept_and_nothing_is_distorted() -> None:
    # A ramp along the long side: its middle third survives, at its own slope.
    ramp = torch.linspace(0, 1, 96).view(1, 96, 1).expand(32, 96, 1)
    reference = prepare_reference(ramp, 32, 32)
    torch.testing.assert_close((reference[0, 0, 0] + 1) / 2, ramp[0, 32:64, 0])
    reference = prepare_reference(ramp.transpose(0, 1), 32, 32)
    torch.testing.assert_close((reference[0, 0, :, 0] + 1) / 2, ramp[0, 32:64, 0])


def test_shrinking_averages() -> None:
    checks = (torch.arange(64)[:, None] + torch.arange(64)).remainder(2).float()
    reference = prepare_reference(checks.unsqueeze(-1), 16, 16)
    assert reference[:, :, 2:-2, 2:-2].abs().max() < 0.02


def test_shapes_that_mean_the_same_give_the_same() -> None:
    grey = torch.rand(20, 30, 1, generator=torch.Generator().manual_seed(0))
    expected = prepare_reference(grey, 16, 32)
    assert torch.equal(prepare_reference(grey.unsqueeze(0), 16, 32), expected)
    assert torch.equal(prepare_reference(grey.expand(-1, -1, 3), 16, 32), expected)
    opaque = torch.cat((grey.expand(-1, -1, 3), torch.ones(20, 30, 1)), 2)
    assert torch.equal(prepare_reference(opaque, 16, 32), expected)
    assert torch.equal(prepare_reference(grey.double(), 16, 32), expected)


def test_values_outside_the_range_are_clipped() -> None:
    reference = prepare_reference(torch.tensor([-0.5, 0.5, 1.5]).expand(20, 20, 3), 16, 16)
    torch.testing.assert_close(reference[0, :, 8, 8], torch.tensor([-1.0, 0.0, 1.0]))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.zeros(2, 20, 20, 3), "got 2 pictures; give one"),
        (torch.zeros(20, 20), "shape"),
        (torch.zeros(3, 20, 20), "channels"),
        (torch.zeros(20, 20, 3, dtype=torch.uint8), "uint8 pixels.*divide by 255"),
        (torch.zeros(15, 20, 3), "20x15 picture.*at least 16"),
        (torch.zeros(20, 15, 3), "15x20 picture"),
        (torch.full((20, 20, 3), float("nan")), "NaN"),
    ],
)
def test_pixels_that_are_no_portrait_are_refused(image: torch.Tensor, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        prepare_reference(image, 16, 16)


def test_a_size_that_the_model_cannot_take_is_refused() -> None:
    with pytest.raises(GeometryError, match="height 100"):
        prepare_reference(torch.zeros(20, 20, 3), 100, 96)


def test_pictures_of_a_video_are_prepared_when_asked_for() -> None:
    prepared = []

    class Pictures(list[torch.Tensor]):
        def __getitem__(self, index: int) -> torch.Tensor:  # pyright: ignore
            prepared.append(index)
            return super().__getitem__(index)

    pictures = Pictures([torch.full((20, 30, 3), level) for level in (0.0, 0.5, 1.0)])
    references = References(pictures, 32, 16)
    assert len(references) == 3
    assert prepared == []
    assert torch.equal(references[2], torch.ones(1, 3, 32, 16))
    assert torch.equal(references[-3], -torch.ones(1, 3, 32, 16))
    assert prepared == [2, -3]
    with pytest.raises(IndexError):
        references[3]


@pytest.mark.parametrize("num_frames", [1, 5])
def test_a_picture_is_shown_once_and_then_grey(num_frames: int) -> None:
    picture = torch.rand(1, 3, 16, 32)
    clip = reference_clip(picture, num_frames)
    assert clip.shape == (1, 3, num_frames, 16, 32)
    assert torch.equal(clip[:, :, 0], picture)
    assert not clip[:, :, 1:].any()


@pytest.mark.parametrize("suffix", ["png", "jpg", "tiff", "webp"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_all_orientations_are_applied(tmp_path: Path, suffix: str, orientation: int) -> None:
    stored = np.zeros((24, 40, 3), dtype=np.uint8)
    stored[:8, :8], stored[:8, 32:] = 255, 128
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"picture.{suffix}"
    lossless: dict[str, Any] = {"lossless": True} if suffix == "webp" else {"quality": 100}
    Image.fromarray(stored).save(path, exif=exif, **lossless)
    transposes, flipped = UPRIGHT[orientation]
    expected = np.flip(stored.transpose(1, 0, 2) if transposes else stored, flipped)
    shown = read_image(path).numpy() * 255
    assert shown.shape == expected.shape
    assert np.abs(shown - expected).max() < 8


def _chunk(kind: bytes, content: bytes) -> bytes:
    """Return a chunk of a PNG file."""
    return (
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", crc32(kind + content))
    )


def _with_chunk(path: Path, kind: bytes, content: bytes) -> None:
    """Insert a chunk into a PNG file, after its first."""
    data = path.read_bytes()
    path.write_bytes(data[:33] + _chunk(kind, content) + data[33:])


def _exif(orientation: bytes) -> bytes:
    """Return EXIF data of one tag, whose type, count and value are given."""
    return b"MM\0*\0\0\0\x08\0\1\x01\x12" + orientation + bytes(4)


ABSURD = {
    "no TIFF": b"not EXIF at all",
    "empty": b"",
    "cut": b"MM\0*\0\0\0\x08\0\x09\x01\x12",
    "zero": _exif(b"\0\3\0\0\0\1\0\0\0\0"),
    "nine": _exif(b"\0\3\0\0\0\1\0\x09\0\0"),
    "text": _exif(b"\0\2\0\0\0\2a\0\0\0"),
    "far away": _exif(b"\0\3\0\0\xff\xff\xff\xff\xff\xff"),
}
"""EXIF data that state no orientation."""


@pytest.mark.parametrize("exif", ABSURD.values(), ids=ABSURD)
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_a_picture_with_damaged_exif_is_read(tmp_path: Path, suffix: str, exif: bytes) -> None:
    path = tmp_path / f"picture.{suffix}"
    if suffix == "png":
        _two_colours().save(path)
        _with_chunk(path, b"eXIf", exif)
    elif suffix == "webp":
        _two_colours().save(path, exif=exif or b"\0", lossless=True)
    else:
        _two_colours().save(path, quality=100)
        data = path.read_bytes()
        marked = b"Exif\0\0" + exif
        segment = b"\xff\xe1" + struct.pack(">H", len(marked) + 2) + marked
        path.write_bytes(data[:2] + segment + data[2:])
    shown = read_image(path).numpy() * 255
    assert shown.shape == (24, 40, 3)
    assert np.abs(shown - np.asarray(_two_colours())).mean() < 4


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        (b"iCCP", b"name\0\0not zlib"),
        (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation='\xff"),
        (b"iTXt", b'XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation="9"/>'),
        (b"zTXt", b"title\0\0not zlib"),
    ],
)
def test_a_picture_with_damaged_metadata_is_read(
    tmp_path: Path, kind: bytes, content: bytes
) -> None:
    path = tmp_path / "picture.png"
    _two_colours().save(path)
    _with_chunk(path, kind, content)
    assert torch.equal(read_image(path) * 255, torch.from_numpy(np.array(_two_colours())).float())


def test_a_damaged_colour_profile_does_not_matter(tmp_path: Path) -> None:
    for suffix in ("jpg", "webp", "tiff"):
        path = tmp_path / f"picture.{suffix}"
        _two_colours().save(path, icc_profile=b"no profile", quality=100)
        assert read_image(path).shape == (24, 40, 3)


def _tiff(
    pixels: np.ndarray, *, kind: int = 1, num_bits: int = 0, white_is_zero: bool = False
) -> bytes:
    """Return a grey TIFF file; TIFF 6.0, sections 2, 3 and 19.

    Args:
        pixels: [H, W] of any dtype.
        kind: 1 for unsigned, 2 for signed integers, 3 for floating point.
        num_bits: bits of a sample, if the rows are packed; a multiple of four.
        white_is_zero: whether 0 is white.
    """
    height, width = pixels.shape
    bits = num_bits or 8 * pixels.dtype.itemsize
    if num_bits:
        width = width * 8 // num_bits
    tags = [
        (256, 4, width), (257, 4, height), (258, 3, bits), (259, 3, 1),
        (262, 3, 0 if white_is_zero else 1), (273, 4, 8 + 2 + 10 * 12 + 4), (277, 3, 1),
        (278, 4, height), (279, 4, pixels.nbytes), (339, 3, kind),
    ]  # fmt: skip
    entries = [
        struct.pack("<HHI", tag, form, 1) + struct.pack("<HH" if form == 3 else "<I", *values)
        for tag, form, value in tags
        for values in [(value, 0) if form == 3 else (value,)]
    ]
    return (
        b"II*\0\x08\0\0\0" + struct.pack("<H", 10) + b"".join(entries) + bytes(4) + pixels.tobytes()
    )


LEVELS = np.linspace(0, 1, 20).repeat(20).reshape(20, 20)


@pytest.mark.parametrize("white_is_zero", [False, True])
def test_deep_tiff_keeps_its_range(tmp_path: Path, white_is_zero: bool) -> None:
    levels = 1 - LEVELS if white_is_zero else LEVELS
    path = tmp_path / "deep.tiff"
    path.write_bytes(_tiff((levels * 65535).round().astype("<u2"), white_is_zero=white_is_zero))
    assert np.abs(read_image(path)[..., 1].numpy() - LEVELS).max() < 1e-4


def test_twelve_bits_keep_their_range(tmp_path: Path) -> None:
    levels = (LEVELS * 4095).round().astype(int)
    first, second = levels[:, ::2], levels[:, 1::2]
    packed = np.stack((first >> 4, (first & 15) << 4 | second >> 8, second & 255), 2)
    (tmp_path / "deep.tiff").write_bytes(
        _tiff(packed.reshape(20, 30).astype(np.uint8), num_bits=12)
    )
    shown = read_image(tmp_path / "deep.tiff")
    assert np.abs(shown[..., 1].numpy() - LEVELS).max() < 1e-3


@pytest.mark.parametrize("most", [4095, 65535])
def test_deep_pgm_keeps_its_range(tmp_path: Path, most: int) -> None:
    pixels = (LEVELS * most).round().astype(">u2").tobytes()
    (tmp_path / "deep.pgm").write_bytes(b"P5 20 20 %d\n" % most + pixels)
    shown = read_image(tmp_path / "deep.pgm")
    assert np.abs(shown[..., 1].numpy() - LEVELS).max() < 1e-3


@pytest.mark.parametrize(("dtype", "kind"), [("<i2", 2), ("<u4", 1), ("<i4", 2), ("<f4", 3)])
def test_pixels_whose_white_is_unknown_are_refused(tmp_path: Path, dtype: str, kind: int) -> None:
    path = tmp_path / "deep.tiff"
    path.write_bytes(_tiff((LEVELS * 200).astype(dtype), kind=kind))
    with pytest.raises(ImageError, match="white is unknown; save it as PNG") as caught:
        read_image(path)
    assert not isinstance(caught.value, NoPictureError)


@pytest.mark.parametrize("size", [(12_000, 9_000), (40_000, 30_000)])
def test_a_picture_that_is_too_large_is_told_its_size(
    tmp_path: Path, size: tuple[int, int]
) -> None:
    path = tmp_path / "large.jpg"
    Image.new("RGB", (16, 16)).save(path)
    data = path.read_bytes()
    start = data.find(b"\xff\xc0") + 5  # the frame header, with height and width
    path.write_bytes(data[:start] + struct.pack(">HH", size[1], size[0]) + data[start + 4 :])
    with pytest.raises(ImageError, match=r"large\.jpg is too large.*; save it smaller") as caught:
        read_image(path)
    assert not isinstance(caught.value, NoPictureError)


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tiff"])
def test_of_an_animation_the_user_is_told(
    tmp_path: Path, suffix: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / f"moving.{suffix}"
    pictures = [Image.new("RGB", (20, 20), colour) for colour in (RED, BLUE)]
    pictures[0].save(path)
    read_image(path)
    assert not caplog.text
    pictures[0].save(path, save_all=True, append_images=pictures[1:])
    assert read_image(path)[0, 0, 0] > 0.9
    assert f"moving.{suffix} holds several pictures; the first is used" in caplog.text


def test_further_views_of_a_photo_are_not_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "photo.jpg"
    image = Image.new("RGB", (20, 20), RED)
    image.save(path, format="MPO", save_all=True, append_images=[image])
    read_image(path)
    assert not caplog.text


@pytest.mark.parametrize("transfer", [PQ, HLG])
def test_pictures_of_high_dynamic_range_are_tone_mapped(tmp_path: Path, transfer: int) -> None:
    path = tmp_path / "bright.png"
    Image.new("RGB", (20, 20), (150, 110, 100)).save(path)
    plain = read_image(path)
    _with_chunk(path, b"cICP", bytes([9, transfer, 0, 1]))
    torch.testing.assert_close(read_image(path), tone_map(plain, transfer))
    Image.new("RGB", (20, 20), (150, 110, 100)).save(path)
    _with_chunk(path, b"cICP", bytes([1, 13, 0, 1]))  # sRGB
    assert torch.equal(read_image(path), plain)


def test_grey_with_transparency_keeps_it(tmp_path: Path) -> None:
    Image.new("LA", (20, 20), (100, 50)).save(tmp_path / "la.png")
    torch.testing.assert_close(
        read_image(tmp_path / "la.png")[0, 0] * 255, torch.tensor([100.0, 100.0, 100.0, 50.0])
    )
    Image.new("L", (20, 20), 7).save(tmp_path / "key.png", transparency=7)
    assert read_image(tmp_path / "key.png")[0, 0, 3] == 0
