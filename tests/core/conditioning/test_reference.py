"""Portraits in all formats decode to the same picture, or raise an error with the reason."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from turbotalk_core.conditioning.reference import (
    References,
    prepare_reference,
    read_image,
    reference_clip,
)
from turbotalk_core.errors import GeometryError, ImageError

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
