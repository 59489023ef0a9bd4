"""Sound from files and from memory, and its reduction to what the encoder takes.

Goes in: a path, or samples of any type. Comes out: ``Waveform``, or 16 kHz mono samples. Separate
because it is the only file of this room that decodes media.

Axes: C channels, S audio samples.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import av
import torch
import torchaudio.functional as AF
from av.container import InputContainer
from av.error import FFmpegError
from torch import Tensor

from ..errors import AudioError, TurboTalkError
from ..geometry import MAX_SAMPLE_RATE, MAX_SAMPLES, MIN_SAMPLE_RATE, SAMPLE_RATE
from ..trust import check_tables, is_file, media_options
from ..types import Waveform

# An odd rate such as 44101 Hz would need a resampling filter of gigabytes; a ratio this fine drifts
# by less than a tenth of a video frame per hour.
MAX_RATIO_DENOMINATOR = 1_000


def read_audio(path: str | Path) -> Waveform:
    """Decode the first audio stream of a local file.

    Args:
        path: any codec that PyAV decodes, in a container of ``trust.CONTAINERS``: wav, mp3, flac,
            m4a, ogg, opus, or the sound of mp4, mov, mkv, webm, and others.

    Returns:
        All channels at the file's own rate. Padding that the encoder added in front or behind is
        dropped where the file declares it; peaks of lossy formats may exceed 1 slightly.

    Raises:
        AudioError: there is no such file, it is no media file or damaged, it has no audio stream,
            the stream is empty or longer than ``MAX_SAMPLES``, or its samples are not finite.
    """
    blocks = []
    room = MAX_SAMPLES
    with _open(path) as container:
        for frame in container.decode(audio=0):
            block = _decode_frame(frame)
            # Counted while it comes: silence of days fits into a file of kilobytes.
            room -= block.samples_CS.numel() * max(1, SAMPLE_RATE // block.sample_rate)
            if room < 0:
                raise AudioError(
                    f"{path} has more than {MAX_SAMPLES} samples, {block.sample_rate} a second in "
                    f"{block.samples_CS.shape[0]} channels; export a part of it, or fewer channels"
                )
            blocks.append(block)
    if not blocks:
        raise AudioError(f"the audio stream of {path} is empty; give at least 40 ms of sound")
    layouts = {(block.sample_rate, block.samples_CS.shape[0]) for block in blocks}
    if len(layouts) > 1:
        raise AudioError(
            f"{path} changes its sample rate or channel count on the way: (Hz, channels) are "
            f"{sorted(layouts)}; re-export it with one of them"
        )
    return Waveform(
        samples_CS=torch.cat([block.samples_CS for block in blocks], dim=1),
        sample_rate=blocks[0].sample_rate,
    )


def read_first_second(path: str | Path) -> Fraction:
    """Tell when the sound of a file begins, by the file's own clock; a video's rarely differs.

    Args:
        path: as for ``read_audio``.

    Returns:
        Seconds, of the first sample that ``read_audio`` gives; 0 where the file does not say.

    Raises:
        AudioError: the file is missing or damaged, or has no audio stream.
    """
    with _open(path) as container:
        first = next(container.decode(audio=0), None)
        if first is None or first.pts is None or first.time_base is None:
            return Fraction(0)
        return first.pts * first.time_base


def from_samples(samples: Tensor, sample_rate: int) -> Waveform:
    """Take over sound that is already in memory.

    Args:
        samples: [S], [C, S] or [1, C, S]; floating point in [-1, 1], or integers of which the whole
            range of their type means [-1, 1] (unsigned ones around its middle).
        sample_rate: Hz.

    Returns:
        float32 on the CPU.

    Raises:
        AudioError: another shape (such as a batch) or type, no samples, or not finite ones.
    """
    shape = tuple(samples.shape)
    if samples.ndim == 3 and shape[0] == 1:
        samples = samples[0]
    elif samples.ndim == 1:
        samples = samples[None]
    if samples.ndim != 2:
        raise AudioError(
            f"got samples of shape {shape}; one sound is [samples], [channels, samples] or "
            "[1, channels, samples], so pass a batch one by one"
        )
    return Waveform(samples_CS=_to_float(samples), sample_rate=sample_rate)


def to_mono_16k(waveform: Waveform) -> Tensor:
    """Average the channels and resample to the encoder's 16 kHz.

    Args:
        waveform: any rate from 1 kHz on, any channel count.

    Returns:
        [S] float32, ceil(16000 * seconds) samples.

    Raises:
        AudioError: the sample rate is under 1 kHz.
    """
    return resample(waveform.samples_CS.mean(dim=0), waveform.sample_rate, SAMPLE_RATE)


def resample(samples: Tensor, sample_rate: int, wanted_rate: int) -> Tensor:
    """Bring sound to another sample rate.

    Args:
        samples: [..., S].
        sample_rate: of the samples, Hz.
        wanted_rate: Hz.

    Returns:
        [..., ceil(S * wanted_rate / sample_rate)], but for odd ratios a few samples more or fewer.

    Raises:
        AudioError: the sample rate is under 1 kHz, or above ``MAX_SAMPLE_RATE``.
    """
    if not MIN_SAMPLE_RATE <= sample_rate <= MAX_SAMPLE_RATE:  # or the filter may need gigabytes
        raise AudioError(
            f"got a sample rate of {sample_rate} Hz; speech needs at least {MIN_SAMPLE_RATE} Hz "
            f"and at most {MAX_SAMPLE_RATE}, so give the recording at its true rate"
        )
    ratio = Fraction(sample_rate, wanted_rate).limit_denominator(MAX_RATIO_DENOMINATOR)
    return AF.resample(samples, ratio.numerator, ratio.denominator)


@contextmanager
def _open(path: str | Path) -> Iterator[InputContainer]:
    """Open a local file that has sound; what goes wrong while it is open is told of, too."""
    if not is_file(Path(path)):
        raise AudioError(f"there is no audio file at {path}; give the path of a local file")
    try:
        with Path(path).open("rb") as file:
            check_tables(file)
        # A playlist must not make us open a network address, nor a name with a colon a protocol.
        # Titles need not be UTF-8, and nobody asks for them.
        with av.open(
            f"file:{path}", options=media_options("file"), metadata_errors="replace"
        ) as container:
            if not container.streams.audio:
                raise AudioError(
                    f"{path} has no audio stream; give a recording, or a video with sound"
                )
            yield container
    except TurboTalkError:
        raise
    # FFmpeg's errors, and what PyAV stumbles over in damaged files.
    except (FFmpegError, OSError, ValueError, LookupError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, FFmpegError) else error
        raise AudioError(
            f"{path} cannot be decoded as audio ({reason}); re-export it as wav, mp3, flac or m4a"
        ) from error


def _decode_frame(frame: av.AudioFrame) -> Waveform:
    try:
        samples = torch.from_numpy(frame.to_ndarray())
    except ValueError as error:
        raise AudioError(
            f"got samples of format {frame.format.name}, which cannot be read; re-export the audio "
            "with 16, 24 or 32 bits or floating point"
        ) from error
    if not frame.format.is_planar:  # one row of interleaved channels
        samples = samples.reshape(-1, frame.layout.nb_channels).T
    return Waveform(samples_CS=_to_float(samples), sample_rate=frame.sample_rate)


def _to_float(samples: Tensor) -> Tensor:
    if samples.is_floating_point():
        return samples.detach().to("cpu", torch.float32)
    if samples.dtype == torch.bool or samples.is_complex():
        raise AudioError(
            f"got samples of type {samples.dtype}; floating point or integer samples are allowed"
        )
    info = torch.iinfo(samples.dtype)
    half_range = 2.0 ** (info.bits - 1)
    middle = 1.0 if info.min == 0 else 0.0
    return samples.to("cpu", torch.float32) / half_range - middle
