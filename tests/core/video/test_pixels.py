"""Frames become the colours, shapes and directions that their file states, with every PyAV."""

from fractions import Fraction

import av
import numpy as np
import pytest
import torch

from turbotalk_core.hdr import HLG, tone_map
from turbotalk_core.video.pixels import BT601, BT709, Appearance, guess_matrix

UNSPECIFIED, SMPTE170M, SMPTE240M, BT2020 = 2, 6, 7, 9
LIMITED, FULL = 1, 2
# Weights of red and blue in the luma, ISO/IEC 23091-2 table 4
WEIGHTS = {
    BT709: (0.2126, 0.0722),
    BT601: (0.299, 0.114),
    SMPTE170M: (0.299, 0.114),
    SMPTE240M: (0.212, 0.087),
    BT2020: (0.2627, 0.0593),
}
COLORS = [(254, 0, 0), (200, 60, 30), (30, 200, 60), (10, 20, 240), (255, 255, 255), (0, 0, 0)]
PLAIN = Appearance(aspect=Fraction(1), transfer=2, matrix=BT601)


def _encode(color: tuple[int, ...], matrix: int, is_full: bool, bits: int) -> list[int]:
    """Return luma and chroma of a colour."""
    red, green, blue = (value / 255 for value in color)
    of_red, of_blue = WEIGHTS[matrix]
    luma = of_red * red + (1 - of_red - of_blue) * green + of_blue * blue
    chroma = [(blue - luma) / (2 - 2 * of_blue), (red - luma) / (2 - 2 * of_red)]
    scale = 2 ** (bits - 8)
    if is_full:
        most = 2**bits - 1
        return [round(luma * most), *(round(value * most + 128 * scale) for value in chroma)]
    return [round((16 + 219 * luma) * scale)] + [
        round((128 + 224 * value) * scale) for value in chroma
    ]


def _fill(layout: str, values: list[int], size: tuple[int, int] = (16, 16)) -> av.VideoFrame:
    frame = av.VideoFrame(size[1], size[0], layout)
    dtype = np.uint16 if frame.format.components[0].bits > 8 else np.uint8
    for plane, value in zip(frame.planes, values, strict=True):
        plane.update(np.full(plane.buffer_size // dtype().itemsize, value, dtype).tobytes())
    return frame


@pytest.mark.parametrize(
    ("layout", "bits"),
    [("yuv420p", 8), ("yuv422p", 8), ("yuv444p", 8), ("yuv420p10le", 10), ("yuvj420p", 8)],
)
@pytest.mark.parametrize("matrix", WEIGHTS)
@pytest.mark.parametrize("color_range", [0, LIMITED, FULL])
def test_colours_are_those_of_the_stated_matrix_and_range(
    layout: str, bits: int, matrix: int, color_range: int
) -> None:
    is_full = color_range == FULL or layout == "yuvj420p"
    for color in COLORS:
        frame = _fill(layout, _encode(color, matrix, is_full, bits))
        frame.colorspace, frame.color_range = matrix, color_range
        pixels_HWC = PLAIN.to_pixels(frame)
        expected = (torch.tensor(color) / 255).expand(16, 16, 3)
        torch.testing.assert_close(pixels_HWC, expected, rtol=0, atol=3.5 / 255)


@pytest.mark.parametrize("matrix", [BT601, BT709])
def test_a_frame_without_a_matrix_gets_that_of_its_size(matrix: int) -> None:
    color = (200, 60, 30)
    frame = _fill("yuv444p", _encode(color, matrix, False, 8))
    frame.colorspace = UNSPECIFIED
    appearance = Appearance(aspect=Fraction(1), transfer=2, matrix=matrix)
    expected = (torch.tensor(color) / 255).expand(16, 16, 3)
    torch.testing.assert_close(appearance.to_pixels(frame), expected, rtol=0, atol=2.5 / 255)


@pytest.mark.parametrize(
    ("width", "height", "matrix"),
    [
        (128, 128, BT601),
        (720, 576, BT601),
        (640, 480, BT601),
        (1280, 720, BT709),
        (720, 1280, BT709),
        (1280, 536, BT709),
    ],
)
def test_players_take_high_definition_for_bt709(width: int, height: int, matrix: int) -> None:
    assert guess_matrix(width, height) == matrix


@pytest.mark.parametrize("layout", ["gray", "ya8", "gray16le", "rgb24", "bgr0", "gbrp", "rgb48le"])
def test_layouts_without_a_matrix_are_read_as_they_are(layout: str) -> None:
    levels = np.arange(0, 256, 1, dtype=np.uint8).reshape(16, 16)
    source = np.repeat(levels[..., None], 3, 2)
    frame = av.VideoFrame.from_ndarray(source, format="rgb24").reformat(format=layout)
    frame.colorspace = BT709
    expected = torch.from_numpy(source).float() / 255
    torch.testing.assert_close(PLAIN.to_pixels(frame), expected, rtol=0, atol=1.5 / 255)


@pytest.mark.parametrize(
    ("layout", "most"), [("yuva420p", 255), ("yuva444p", 255), ("yuva444p12le", 4095)]
)
def test_what_is_transparent_is_white(layout: str, most: int) -> None:
    bits = most.bit_length()
    for alpha in (0, most // 2, most):
        values = _encode((200, 60, 30), BT601, False, bits)
        pixels_HWC = PLAIN.to_pixels(_fill(layout, [*values, alpha]))
        share = alpha / most
        expected = torch.tensor([200, 60, 30]) / 255 * share + 1 - share
        torch.testing.assert_close(pixels_HWC[8, 8], expected, rtol=0, atol=3 / 255)


@pytest.mark.parametrize("layout", ["rgba", "bgra", "pal8"])
def test_transparent_colours_of_graphics_are_white(layout: str) -> None:
    if layout == "pal8":
        palette = np.array([[0, 200, 60, 30], [255, 200, 60, 30]], dtype=np.uint8)  # ARGB
        palette = np.concatenate([palette, np.zeros((254, 4), np.uint8)])
        indices = np.tile(np.array([0, 1], dtype=np.uint8), (16, 8))
        frame = av.VideoFrame.from_ndarray((indices, palette), format="pal8")  # pyright: ignore
    else:
        pixels = np.zeros((16, 16, 4), dtype=np.uint8)
        pixels[...] = (200, 60, 30, 0)
        pixels[:, 1::2, 3] = 255
        frame = av.VideoFrame.from_ndarray(pixels, format="rgba").reformat(format=layout)
    pixels_HWC = PLAIN.to_pixels(frame)
    assert pixels_HWC[3, 4].tolist() == [1, 1, 1]
    torch.testing.assert_close(pixels_HWC[3, 5] * 255, torch.tensor([200.0, 60.0, 30.0]))


@pytest.mark.parametrize("has_alpha", [False, True])
def test_hdr_is_tone_mapped(has_alpha: bool) -> None:
    color = (150, 110, 100)
    values = _encode(color, BT2020, False, 10)
    frame = _fill("yuva444p10le" if has_alpha else "yuv444p10le", [*values, 1023][: 3 + has_alpha])
    frame.colorspace = BT2020
    pixels_HWC = Appearance(aspect=Fraction(1), transfer=HLG, matrix=BT601).to_pixels(frame)
    expected = tone_map((torch.tensor(color) / 255).expand(16, 16, 3), HLG)
    torch.testing.assert_close(pixels_HWC, expected, rtol=0, atol=2.5 / 255)


@pytest.mark.parametrize(
    ("aspect", "size"),
    [
        (Fraction(4, 3), (32, 64)),
        (Fraction(64, 45), (32, 68)),
        (Fraction(2), (32, 96)),
        (Fraction(1, 2), (64, 48)),
        (Fraction(10, 11), (35, 48)),
    ],
)
def test_pixels_become_square(aspect: Fraction, size: tuple[int, int]) -> None:
    source = np.zeros((32, 48, 3), dtype=np.uint8)
    source[:, 24:] = 255
    frame = av.VideoFrame.from_ndarray(source, format="rgb24")
    pixels_HWC = Appearance(aspect=aspect, transfer=2, matrix=BT601).to_pixels(frame)
    assert pixels_HWC.shape == (*size, 3)
    middle = size[1] // 2
    assert pixels_HWC[:, : middle - 2].max() == 0  # what was at the middle is there
    assert pixels_HWC[:, middle + 2 :].min() == 1
