"""Preparation of the reference image from a picture file or a tensor.

The result is [1, 3, H, W] in [-1, 1]. This is the only module of the core that opens picture files.

Axes: B batch, H height, W width, C channels.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from contextlib import suppress
from logging import getLogger
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image
from PIL.TiffImagePlugin import TiffImageFile
from torch import Tensor

from ..errors import ImageError
from ..geometry import MASK_CHANNELS, SIZE_MULTIPLE, check_size, cover_size
from ..hdr import TRANSFERS, tone_map
from ..safe_io.media import MAX_PIXELS
from ..safe_io.paths import is_file

# Formats that Pillow may open. It supports others, but one of them (EPS) is a program that it runs.
FORMATS = (
    "AVIF", "BMP", "DIB", "GIF", "HEIF", "ICO", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "QOI",
    "TGA", "TIFF", "WEBP",
)  # fmt: skip
MIN_SIDE = SIZE_MULTIPLE  # pixels; a smaller side is less than one token
# How a picture becomes upright, by its EXIF orientation; CIPA DC-008, tag 0x0112. 1 is upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Statement of the colours, with the transfer characteristic as its second number. It precedes the
# pixels: the chunk cICP of PNG, and the box colr of AVIF; both as in ISO/IEC 23091-2.
_COLORS = {"PNG": rb"\0\0\0\x04cICP.(.)", "AVIF": rb"colrnclx..\0(.)"}
_HEAD_BYTES = 2**16
_BITS_PER_SAMPLE, _PHOTOMETRIC = 258, 262  # tags of TIFF
_WHITE_IS_ZERO = 0
_SMALLER = "save it smaller, with 4096 pixels on the longer side at most"

_log = getLogger(__name__)


class NoPictureError(ImageError):
    """The file is missing, damaged or no picture; it may be a video."""


def read_image(path: str | Path) -> Tensor:
    """Read a picture file as an image viewer would show it.

    EXIF rotation is applied; metadata that are damaged are not used. The first picture of an
    animation is read, with a note in the log. Greyscale, palette, CMYK and 16-bit pictures become
    RGB, and those of high dynamic range (HLG, PQ) standard range. Transparency is kept for
    ``prepare_reference``.

    Args:
        path: picture file of one of ``FORMATS``, with at most ``MAX_PIXELS`` pixels.

    Returns:
        [H, W, 3], or [H, W, 4] with alpha, float32 in [0, 1].

    Raises:
        NoPictureError: if the file is missing, damaged or no picture.
        ImageError: if the picture is too large, or its white is unknown.
    """
    try:
        if not is_file(Path(path)):
            raise FileNotFoundError("no such file")
        Image.init()
        known = [name for name in FORMATS if name in Image.OPEN]
        with warnings.catch_warnings():
            # Pillow warns of damaged metadata, which are not used, and of sizes, checked here.
            warnings.simplefilter("ignore")
            with Image.open(path, formats=known) as opened:
                return _read(path, opened)
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageError(
            f"{path} is too large: it has over {2 * MAX_PIXELS} pixels; {_SMALLER}"
        ) from error
    except Exception as error:  # on damaged files Pillow's plugins raise errors of any class
        raise NoPictureError(
            f"cannot read a picture from {path}: {error}; give a PNG, JPEG or WebP file"
        ) from error


def _read(path: str | Path, opened: Image.Image) -> Tensor:
    # Checked before decoding: a file of a few bytes can declare any size.
    if opened.width * opened.height > MAX_PIXELS:
        raise ImageError(
            f"{path} is too large: {opened.width}x{opened.height} are over {MAX_PIXELS} pixels; "
            f"{_SMALLER}"
        )
    # A phone's MPO file holds further views or a depth map, which no viewer shows.
    if getattr(opened, "is_animated", False) and opened.format != "MPO":
        _log.warning("%s holds several pictures; the first is used", path)
    pixels_HWC = torch.from_numpy(_to_pixels(path, opened))
    transfer = _find_transfer(path, opened.format)
    if transfer in TRANSFERS:
        pixels_HWC[..., :3] = tone_map(pixels_HWC[..., :3], transfer)
    return pixels_HWC


def prepare_reference(image: Tensor, height: int, width: int) -> Tensor:
    """Fit a picture to the video: resize to cover it, crop the centre, blend alpha onto white.

    Args:
        image: [H, W, C] or [1, H, W, C], float; C is 1 (grey), 3 (RGB) or 4 (RGB and alpha).
            Values outside [0, 1] are clipped.
        height: height of the video, pixels.
        width: width of the video, pixels.

    Returns:
        [1, 3, height, width], float32 in [-1, 1], on the CPU.

    Raises:
        ImageError: if there are several pictures, a side is under 16 pixels, the shape or dtype is
            wrong, or a pixel is NaN or infinite.
        GeometryError: if the model cannot make videos of that size.
    """
    check_size(height, width)
    _check(image)
    image_BCHW = image.reshape(1, *image.shape[-3:]).permute(0, 3, 1, 2).to("cpu", torch.float32)
    image_BCHW = image_BCHW.clamp(0, 1)
    if image_BCHW.shape[1] == 4:
        # Before resizing, which would mix the colour of transparent pixels into visible ones.
        rgb, alpha = image_BCHW[:, :3], image_BCHW[:, 3:]
        image_BCHW = rgb * alpha + (1 - alpha)
    covered = _cover(image_BCHW, height, width).expand(-1, 3, -1, -1)
    top = (covered.shape[2] - height) // 2
    left = (covered.shape[3] - width) // 2
    return covered[:, :, top : top + height, left : left + width] * 2 - 1


def add_mask(latents_CFHW: Tensor) -> Tensor:
    """Concatenate the mask that marks the reference image and the latents of its clip.

    Args:
        latents_CFHW: of the clip of ``reference_clip``, [..., 16, F, H, W].

    Returns:
        [..., 4 + 16, F, H, W]: the mask, 1 on the first latent frame and 0 on the grey ones after
        it, and the latents.

    Source: Wan 2.1, image-to-video; the channels beside the noisy latents.
    """
    *batch, _, num_latents, height, width = latents_CFHW.shape
    mask_CFHW = latents_CFHW.new_zeros(*batch, MASK_CHANNELS, num_latents, height, width)
    mask_CFHW[..., 0, :, :] = 1
    return torch.cat((mask_CFHW, latents_CFHW), -4)


def reference_clip(picture_BCHW: Tensor, num_frames: int) -> Tensor:
    """Make the clip of a picture followed by grey, whose latents are the reference conditioning.

    Args:
        picture_BCHW: result of ``prepare_reference``.
        num_frames: length of the clip.

    Returns:
        [1, 3, num_frames, H, W] in [-1, 1]; grey is 0.
    """
    return F.pad(picture_BCHW.unsqueeze(2), (0, 0, 0, 0, 0, num_frames - 1))


class References(Sequence[Tensor]):
    """Frames of a video to dub, each fitted to the size of the new video when it is accessed."""

    def __init__(self, pictures: Sequence[Tensor], height: int, width: int) -> None:
        """Store the pictures; none is prepared yet.

        Args:
            pictures: pictures, each a valid input of ``prepare_reference``.
            height: height of the new video, pixels.
            width: width of the new video, pixels.
        """
        self._pictures = pictures
        self._height, self._width = height, width

    def __len__(self) -> int:
        """Return the number of pictures."""
        return len(self._pictures)

    # Single pictures only: a slice of a video could exceed the memory.
    def __getitem__(self, index: int) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return a prepared picture, [1, 3, height, width] in [-1, 1]."""
        return prepare_reference(self._pictures[index], self._height, self._width)


def _cover(image_BCHW: Tensor, height: int, width: int) -> Tensor:
    """Resize, keeping the aspect ratio, to the smallest size that covers height and width."""
    rows, columns = image_BCHW.shape[2:]
    size = cover_size(rows, columns, height, width)
    # Bilinear with antialiasing equals Pillow's bilinear filter, which the reference uses.
    return F.interpolate(image_BCHW, size, mode="bilinear", antialias=True).clamp(0, 1)


def _check(image: Tensor) -> None:
    shape = tuple(image.shape)
    if image.ndim == 4 and shape[0] != 1:
        raise ImageError(f"got {shape[0]} pictures; give one portrait, so pick one of them")
    if image.ndim not in (3, 4) or shape[-1] not in (1, 3, 4):
        raise ImageError(
            f"got a picture of shape {shape}; it must be [height, width, channels] with 1, 3 or 4 "
            "channels"
        )
    if not image.is_floating_point():
        raise ImageError(f"got {image.dtype} pixels; give floats in [0, 1], so divide by 255")
    if min(shape[-3:-1]) < MIN_SIDE:
        raise ImageError(
            f"got a {shape[-2]}x{shape[-3]} picture; each side needs at least {MIN_SIDE} pixels, "
            "so give a larger portrait"
        )
    if not bool(image.isfinite().all()):
        raise ImageError("the picture holds NaN or infinite pixels; export it again")


def _to_pixels(path: str | Path, image: Image.Image) -> np.ndarray:
    is_tiff = image.format == "TIFF"
    if image.mode == "F" or (image.mode == "I" and is_tiff):
        kind = "floating-point" if image.mode == "F" else "signed or 32-bit"
        raise ImageError(f"{path} has {kind} pixels, whose white is unknown; save it as PNG")
    image.load()
    # TIFF's tags, read before the picture is turned; loading turns it there.
    tags = image.tag_v2 if isinstance(image, TiffImageFile) else {}
    image = _turn_upright(image)
    if image.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion to 8 bit clips it
        num_bits = tags.get(_BITS_PER_SAMPLE, (16,))[0]
        grey = np.asarray(image).astype(np.float32) / (2**num_bits - 1)
        if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
            grey = 1 - grey
        return np.repeat(grey[..., None], 3, axis=2)
    mode = "RGBA" if image.has_transparency_data else "RGB"
    pixels = np.asarray(image.convert(mode)).astype(np.float32)
    pixels /= 255  # in place, to hold a large picture in memory only once
    return pixels


def _turn_upright(image: Image.Image) -> Image.Image:
    """Turn and mirror a picture as its metadata state, if they can be read."""
    turn = None
    with suppress(Exception):  # on damaged metadata Pillow raises errors of any class
        turn = _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    return image if turn is None else image.transpose(turn)


def _find_transfer(path: str | Path, format_name: str | None) -> int | None:
    """Return the transfer characteristic that a picture file states, ISO/IEC 23091-2 table 3."""
    pattern = _COLORS.get(format_name or "")
    if pattern is None:
        return None
    with Path(path).open("rb") as file:
        stated = re.search(pattern, file.read(_HEAD_BYTES), re.DOTALL)
    return stated[1][0] if stated else None
