"""Effect of encoding a long voice in sections on audio features and generated mouths.

The command draws minutes of speech and writes tables to standard output. Unlike the other
evaluations it compares two ways to encode speech, not models.

Axes: T video frames, L encoder layers, D feature width, C channels, H height, W width, S samples.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor

from training.avatars.mouth import mouth_curve
from training.avatars.speech import draw_speech
from training.avatars.synthetic import draw_clip
from training.evaluation.generation import DITS, SPLIT, collect_frames, load_family
from training.evaluation.mouth import estimate_aperture, sync
from training.markdown import table
from turbotalk_core.audio.conversation import encode_speech
from turbotalk_core.audio.features import (
    CONTEXT_FRAMES,
    SECTION_FRAMES,
    SILENCE_TAIL_FRAMES,
    encode_in_sections,
)
from turbotalk_core.cli.arguments import Parser, parse_number, parse_threads, parse_whole, run
from turbotalk_core.cli.console import say
from turbotalk_core.errors import RequestError
from turbotalk_core.geometry import FPS, SAMPLE_RATE
from turbotalk_core.pipeline import Models, generate
from turbotalk_core.protocols import AudioEncoder
from turbotalk_core.request import TalkRequest
from turbotalk_core.types import AudioFeatures, FeatureRows, SoundMoments, Speech, Waveform

MOST_MINUTES = 600  # of speech
SETTINGS = ((250, 125), (500, 250), (1000, 125), (1000, 250), (1000, 500), (2000, 250))
PAUSE_LEVEL = 1e-3  # level of the noise in a pause: -60 dB, a quiet room


@dataclass(frozen=True, slots=True)
class SectionNormalized:
    """Encoder that normalises each section by itself; satisfies ``protocols.AudioEncoder``."""

    encoder: AudioEncoder
    first_kernel = None

    def fingerprint(self) -> str:
        """Return the fingerprint of the weights; see ``protocols.AudioEncoder``."""
        return self.encoder.fingerprint()

    def encode(
        self, waveform_S: Tensor, num_frames: int, moments: SoundMoments | None = None
    ) -> Tensor:
        """Encode a section without the statistics of the whole sound."""
        return self.encoder.encode(waveform_S, num_frames)


def draw_voice(seed: int, seconds: float, pause_seconds: float) -> Waveform:
    """Draw speech with a pause in the middle, which contains quiet noise.

    Args:
        seed: seed of the voice.
        seconds: length of the speech with the pause.
        pause_seconds: length of the pause.

    Returns:
        16 kHz mono.
    """
    voice_S = draw_speech(SPLIT, seed, seconds)
    length = round(SAMPLE_RATE * pause_seconds)
    start = (voice_S.shape[0] - length) // 2
    noise_S = torch.randn(length, generator=torch.Generator().manual_seed(seed))
    voice_S[start : start + length] = PAUSE_LEVEL * noise_S
    return Waveform(samples_CS=voice_S[None], sample_rate=SAMPLE_RATE)


def encode_sections(
    voice: Waveform, encoder: AudioEncoder, section: int, context: int
) -> AudioFeatures:
    """Encode a voice in sections, and return all rows in memory.

    Args:
        voice: voice to encode.
        encoder: the audio encoder.
        section: length of a section, video frames.
        context: context on each side of a section, video frames.

    Returns:
        The audio features.
    """
    seconds = Fraction(voice.num_samples, voice.sample_rate)
    features = encode_in_sections(
        voice, Fraction(0), seconds, encoder, section_frames=section, context_frames=context
    )
    return AudioFeatures(features_TLD=features.rows(), num_frames=features.num_frames)


def compare_rows(rows_TLD: Tensor, whole_TLD: Tensor) -> tuple[float, float]:
    """Measure the differences of rows encoded in sections from those encoded at once.

    Args:
        rows_TLD: rows encoded in sections.
        whole_TLD: rows encoded at once.

    Returns:
        Root mean square difference over root mean square, for all rows together; and the 99th
        percentile of that ratio over the rows.
    """
    difference_TLD = rows_TLD - whole_TLD
    size_T = whole_TLD.norm(dim=(1, 2)).clamp(min=1e-9)  # may be 0 for silence
    worst_T = difference_TLD.norm(dim=(1, 2)) / size_T
    relative = difference_TLD.norm() / whole_TLD.norm()
    return float(relative), float(worst_T.quantile(0.99))


def read_mouths(
    features: FeatureRows,
    starts: Sequence[int],
    request: TalkRequest,
    models: Models,
    portrait_BCHW: Tensor,
) -> Tensor:
    """Generate one chunk from each of several times of a voice, and measure the mouth.

    Args:
        features: audio features of a long voice.
        starts: start of each chunk, video frames.
        request: settings of the family.
        models: networks of the family.
        portrait_BCHW: reference image.

    Returns:
        Mouth areas, one chunk after the other.
    """
    readings = []
    for start in starts:
        rows_TLD = features.rows(start, start + request.chunk_frames + SILENCE_TAIL_FRAMES)
        speech = Speech(
            features=AudioFeatures(features_TLD=rows_TLD, num_frames=request.chunk_frames),
            waveform=Waveform(samples_CS=torch.zeros(1, 1), sample_rate=SAMPLE_RATE),
        )
        frames_CTHW = collect_frames(generate(request, [portrait_BCHW], [speech], models))
        readings.append(estimate_aperture(frames_CTHW))
    return torch.cat(readings)


def measure(arguments: argparse.Namespace) -> list[str]:
    """Measure the differences, and return the tables.

    Args:
        arguments: options of ``main``.

    Returns:
        Lines of Markdown.
    """
    if not 0 < arguments.minutes <= MOST_MINUTES or arguments.chunks < 0:
        raise RequestError(
            f"got {arguments.minutes:g} minutes and {arguments.chunks} chunks; give minutes up to "
            f"{MOST_MINUTES}, and chunks from 0 on"
        )
    request, models, encoder = load_family(arguments.weights, arguments.model)
    request = replace(request, seed=arguments.seed)
    seconds = 60 * arguments.minutes
    voices = {
        "speech": draw_voice(arguments.seed, seconds, 0),
        "with a pause": draw_voice(arguments.seed, seconds, seconds / 4),
    }
    rows = []
    whole = {
        name: encode_speech(voice, encoder, hearing="whole").features.rows()
        for name, voice in voices.items()
    }
    for section, context in SETTINGS:
        for norm, variant in (("the section", SectionNormalized(encoder)), ("the whole", encoder)):
            cells = []
            for name, voice in voices.items():
                rows_TLD = encode_sections(voice, variant, section, context).features_TLD
                all_rows, worst = compare_rows(rows_TLD, whole[name])
                cells.append(f"{all_rows:.3f}, {worst:.3f}")
            rows.append([section, context, norm, *cells])
    head = ["section, frames", "context, frames", "normalised by", *voices]
    lines = [table(head, rows, is_tight=True)]
    if arguments.chunks:
        lines += ["", _measure_mouths(arguments, voices["with a pause"], request, models, encoder)]
    return lines


def _measure_mouths(
    arguments: argparse.Namespace,
    voice: Waveform,
    request: TalkRequest,
    models: Models,
    encoder: AudioEncoder,
) -> str:
    true_T = mouth_curve(voice.samples_CS[0], voice.sample_rate).aperture_T
    step = (true_T.shape[0] - request.chunk_frames - FPS) // arguments.chunks
    starts = [step * index for index in range(arguments.chunks)]
    true_T = torch.cat([true_T[start : start + request.chunk_frames] for start in starts])
    portrait_BCHW = draw_clip(SPLIT, arguments.seed, 1).frames_CTHW[:, 0][None]
    readings = {
        label: read_mouths(features, starts, request, models, portrait_BCHW)
        for label, features in (
            ("whole", encode_speech(voice, encoder, hearing="whole").features),
            (
                "in sections, normalised by the whole",
                encode_sections(voice, encoder, SECTION_FRAMES, CONTEXT_FRAMES),
            ),
            (
                "in sections, normalised by the section",
                encode_sections(voice, SectionNormalized(encoder), SECTION_FRAMES, CONTEXT_FRAMES),
            ),
        )
    }
    spread = readings["whole"].std()
    rows = []
    for label, reading_T in readings.items():
        change = (reading_T - readings["whole"]).square().mean().sqrt() / spread
        rows.append([label, f"{sync(reading_T, true_T)[0]:.3f}", f"{change:.3f}"])
    return table(["heard", "correlation", "change"], rows, is_tight=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit code."""
    parser = Parser(prog="python -m training.evaluation.chunked_encoding", description=__doc__)
    parser.add_argument("--weights", type=Path, required=True, help="models folder")
    parser.add_argument("--model", choices=DITS, default="student")
    parser.add_argument(
        "--minutes", type=parse_number, default=10.0, help="of speech (%(default)s)"
    )
    parser.add_argument(
        "--chunks", type=parse_whole, default=12, help="whose mouths are read; 0: no"
    )
    parser.add_argument("--seed", type=int, default=0, help="of voice, avatar and noise")
    parser.add_argument("--threads", type=parse_threads, default=2, help="CPU threads")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    with torch.no_grad():
        return run(lambda: say("\n".join(measure(arguments)) + "\n"))


if __name__ == "__main__":
    sys.exit(main())
