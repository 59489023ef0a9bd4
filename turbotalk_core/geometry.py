"""Sizes of the models, and all arithmetic between seconds, samples, frames and pixels.

No other file multiplies by a stride or repeats a size. Counts are exact integers; no tensors here.
"""

from __future__ import annotations

import math
from fractions import Fraction

from .errors import GeometryError
from .safe_io.media import MAX_PIXELS

FPS = 25  # InfiniteTalk always generates 25 frames per second
SAMPLE_RATE = 16_000  # wav2vec2's input rate, Hz
TEMPORAL_STRIDE = 4  # Wan 2.1 VAE: video frames per latent frame after the first
WINDOW_RADIUS = 2  # audio window: video frames on each side; InfiniteTalk, audio_window = 5
FIRST_WINDOW = 2 * WINDOW_RADIUS + 1  # rows; a chunk's first latent frame covers one video frame
LATER_WINDOW = TEMPORAL_STRIDE + 2 * WINDOW_RADIUS  # each later one covers TEMPORAL_STRIDE
TEXT_LENGTH = 512  # Wan 2.1, text_len: tokens of a text embedding, padded with zeros; all attended
IMAGE_TOKENS = 257  # CLIP ViT-H/14 at 224 pixels: 16 x 16 patches and one for the whole
SPATIAL_STRIDE = 8  # Wan 2.1 VAE: pixels per latent cell
PATCH = 2  # Wan 2.1 DiT: latent cells per token, height and width
SIZE_MULTIPLE = SPATIAL_STRIDE * PATCH  # pixels; odd latent sides break the rotary embedding
LATENT_CHANNELS = 16  # Wan 2.1 VAE
# Above these nothing real lies, only damage and mischief:
MAX_FRAMES = 10_000_000  # of a video: four days and a half
MAX_SIDE = 16_384  # of a picture, pixels, as the host's largest
MIN_SAMPLE_RATE = 1_000  # Hz; below it no speech sound is left
MAX_SAMPLE_RATE = 384_000  # Hz; of the finest recordings
MAX_SAMPLES = 2**30  # of a sound, all channels together, at 16 kHz or its own rate: 4 GiB


def count_frames(num_samples: int, sample_rate: int) -> int:
    """Count the whole video frames that an audio covers: floor(FPS * seconds).

    Args:
        num_samples: length of the audio, in samples per channel.
        sample_rate: Hz.

    Returns:
        The number of video frames, computed without rounding error.

    Source: InfiniteTalk, generate_infinitetalk.py (video_length is truncated to an integer).
    """
    return num_samples * FPS // sample_rate


def count_samples(num_frames: int, sample_rate: int, fps: Fraction | int = FPS) -> int:
    """Count the audio samples that cover a number of video frames, rounded to nearest.

    Args:
        num_frames: video frames.
        sample_rate: Hz.
        fps: frames per second.

    Returns:
        round(num_frames * sample_rate / fps), halves upwards.
    """
    return math.floor(Fraction(num_frames * sample_rate) / fps + Fraction(1, 2))


def retime(start: int, stop: int, fps: Fraction) -> list[int]:
    """Choose the frames that a video of another frame rate shows: those on the screen at its times.

    Nothing drifts: each shown frame is late by less than one of our own, however long the video.

    Args:
        start: first of our frames, ``FPS`` of them per second.
        stop: one past the last.
        fps: wanted frames per second.

    Returns:
        Frames in [start, stop), in order, some left out or repeated; those of adjacent spans follow
        each other as those of the whole.
    """
    first, last = (math.ceil(frame * fps / FPS) for frame in (start, stop))
    return [math.floor(index * FPS / fps) for index in range(first, last)]


def count_latent_frames(num_frames: int) -> int:
    """Count the latent frames of a clip.

    Args:
        num_frames: video frames; must be 4n + 1.

    Returns:
        n + 1.

    Raises:
        GeometryError: the count is not 4n + 1 with n >= 0.
    """
    if num_frames < 1 or (num_frames - 1) % TEMPORAL_STRIDE:
        lower = max(1, num_frames - (num_frames - 1) % TEMPORAL_STRIDE)
        raise GeometryError(
            f"got {num_frames} frames; the video codec takes {TEMPORAL_STRIDE}n + 1 frames, "
            f"so use {lower} or {lower + TEMPORAL_STRIDE}"
        )
    return (num_frames - 1) // TEMPORAL_STRIDE + 1


def count_decoded_frames(num_latent_frames: int) -> int:
    """Count the video frames that a number of latent frames decodes to: 4(n - 1) + 1."""
    return (num_latent_frames - 1) * TEMPORAL_STRIDE + 1


def check_size(height: int, width: int) -> None:
    """Refuse a picture size that the model cannot take.

    Args:
        height: pixels.
        width: pixels.

    Raises:
        GeometryError: a side is under one token, over ``MAX_SIDE`` or no multiple of
            ``SIZE_MULTIPLE``, or both make more than ``MAX_PIXELS``.
    """
    for name, side in (("height", height), ("width", width)):
        if not SIZE_MULTIPLE <= side <= MAX_SIDE or side % SIZE_MULTIPLE:
            near = min(max(side, SIZE_MULTIPLE), MAX_SIDE)
            nearest = round(near / SIZE_MULTIPLE) * SIZE_MULTIPLE
            raise GeometryError(
                f"got {name} {side}; the model takes multiples of {SIZE_MULTIPLE} from "
                f"{SIZE_MULTIPLE} to {MAX_SIDE}, so use {nearest}"
            )
    if height * width > MAX_PIXELS:
        raise GeometryError(
            f"got {width}x{height}; frames have at most {MAX_PIXELS} pixels, such as 8192x8192"
        )


def fit_size(height: int, width: int, area: int) -> tuple[int, int]:
    """Find the size nearest to an aspect ratio and an area that the model takes.

    Args:
        height: of the picture to follow, pixels.
        width: of the picture to follow, pixels.
        area: wanted height * width, pixels.

    Returns:
        (height, width), each a multiple of ``SIZE_MULTIPLE`` and at most ``MAX_SIDE``.

    Raises:
        GeometryError: a side or the area is not positive.
    """
    if min(height, width, area) < 1:
        raise GeometryError(
            f"got a {width}x{height} picture and an area of {area}; all must be positive"
        )
    scale = math.sqrt(area / (height * width))
    fitted = (round(side * scale / SIZE_MULTIPLE) * SIZE_MULTIPLE for side in (height, width))
    rows, columns = (min(MAX_SIDE, max(SIZE_MULTIPLE, side)) for side in fitted)
    return rows, columns


def cover_size(rows: int, columns: int, height: int, width: int) -> tuple[int, int]:
    """Find the smallest size of a picture's shape that covers a video.

    Args:
        rows: of the picture, pixels.
        columns: of the picture, pixels.
        height: of the video, pixels.
        width: of the video, pixels.

    Returns:
        (height, width), one of them the video's and the other at least so, rounded up.

    Raises:
        GeometryError: a side would be over ``MAX_SIDE``: the picture is a strip.
    """
    if width * rows >= height * columns:
        covered = -(-rows * width // columns), width
    else:
        covered = height, -(-columns * height // rows)
    if max(covered) > MAX_SIDE:
        raise GeometryError(
            f"got a {columns}x{rows} picture for a {width}x{height} video, which it would cover at "
            f"{covered[1]}x{covered[0]}, over {MAX_SIDE}; cut it to the shape of the video"
        )
    return covered
