"""Sizes of the models, and all arithmetic between seconds, samples, frames and pixels.

No other file multiplies by a stride or repeats a size. Counts are exact integers; there are no
tensors here.
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
MASK_CHANNELS = 4  # Wan 2.1 image-to-video: one per video frame of a latent frame
# Limits that real media do not exceed, only damaged or malicious files:
MAX_FRAMES = 10_000_000  # per video: four and a half days
MAX_SIDE = 16_384  # pixels of a picture's side, as the largest in ComfyUI
MIN_SAMPLE_RATE = 1_000  # Hz; below it no speech is left
MAX_SAMPLE_RATE = 384_000  # Hz; the highest rate of recordings
MAX_SAMPLES = 2**30  # per sound, all channels together, at 16 kHz or its own rate: 4 GiB


def count_frames(num_samples: int, sample_rate: int) -> int:
    """Return the number of whole video frames that a sound covers: floor(FPS * seconds).

    Args:
        num_samples: length of the sound, in samples per channel.
        sample_rate: sample rate, Hz.

    Returns:
        The number of video frames, computed without rounding error.

    Source: InfiniteTalk, generate_infinitetalk.py (video_length is truncated to an integer).
    """
    return num_samples * FPS // sample_rate


def count_samples(num_frames: int, sample_rate: int, fps: Fraction | int = FPS) -> int:
    """Return the number of audio samples that cover a number of video frames.

    Args:
        num_frames: number of video frames.
        sample_rate: sample rate, Hz.
        fps: frames per second.

    Returns:
        round(num_frames * sample_rate / fps), halves rounded up.
    """
    return math.floor(Fraction(num_frames * sample_rate) / fps + Fraction(1, 2))


def retime(start: int, stop: int, fps: Fraction) -> list[int]:
    """Choose the source frames of a video with another frame rate, each shown at its own time.

    The timing does not drift: each frame is late by less than one source frame, however long the
    video is.

    Args:
        start: first source frame; there are ``FPS`` per second.
        stop: one past the last source frame.
        fps: frames per second of the new video.

    Returns:
        Frame numbers in [start, stop), in order, with some left out or repeated. The results of
        adjacent spans, concatenated, equal the result of the whole.
    """
    first, last = (math.ceil(frame * fps / FPS) for frame in (start, stop))
    return [math.floor(index * FPS / fps) for index in range(first, last)]


def count_latent_frames(num_frames: int) -> int:
    """Return the number of latent frames of a clip.

    The VAE encodes the first video frame alone and then every four frames together.

    Args:
        num_frames: number of video frames, 4n + 1.

    Returns:
        n + 1.

    Raises:
        GeometryError: if the number is not 4n + 1 with n >= 0.
    """
    if num_frames < 1 or (num_frames - 1) % TEMPORAL_STRIDE:
        lower = max(1, num_frames - (num_frames - 1) % TEMPORAL_STRIDE)
        raise GeometryError(
            f"got {num_frames} frames; the video codec takes {TEMPORAL_STRIDE}n + 1 frames, "
            f"so use {lower} or {lower + TEMPORAL_STRIDE}"
        )
    return (num_frames - 1) // TEMPORAL_STRIDE + 1


def count_video_tokens(num_frames: int, height: int, width: int) -> int:
    """Return the number of video tokens of a clip, among which self-attention attends.

    Args:
        num_frames: number of video frames, 4n + 1.
        height: height of the video, pixels.
        width: width of the video, pixels.

    Returns:
        One token per latent frame and ``SIZE_MULTIPLE`` x ``SIZE_MULTIPLE`` pixels.
    """
    return count_latent_frames(num_frames) * (height // SIZE_MULTIPLE) * (width // SIZE_MULTIPLE)


def count_decoded_frames(num_latent_frames: int) -> int:
    """Return the number of video frames decoded from n latent frames: 4(n - 1) + 1."""
    return (num_latent_frames - 1) * TEMPORAL_STRIDE + 1


def check_size(height: int, width: int) -> None:
    """Check that the model can make videos of a size.

    Args:
        height: height of the video, pixels.
        width: width of the video, pixels.

    Raises:
        GeometryError: if a side is under one token, over ``MAX_SIDE`` or no multiple of
            ``SIZE_MULTIPLE``, or there are more than ``MAX_PIXELS`` pixels.
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
    """Compute a video size near the aspect ratio of a picture and a given area.

    Args:
        height: height of the picture, pixels.
        width: width of the picture, pixels.
        area: wanted height * width, pixels.

    Returns:
        (height, width), each a multiple of ``SIZE_MULTIPLE`` and at most ``MAX_SIDE``.

    Raises:
        GeometryError: if a side or the area is not positive.
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
    """Compute the smallest size with a picture's aspect ratio that covers a video.

    Args:
        rows: height of the picture, pixels.
        columns: width of the picture, pixels.
        height: height of the video, pixels.
        width: width of the video, pixels.

    Returns:
        (height, width); one equals that of the video and the other is at least as large, rounded
        up.

    Raises:
        GeometryError: if a side would exceed ``MAX_SIDE``, as the picture is too long and narrow.
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
