"""Parser of prompts that change with time: ``0-4s: he smiles | 4-9s: he frowns``.

Separate because the command line and the nodes parse the same prompts, each with a text encoder of
its own.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from ..errors import RequestError
from ..geometry import count_frames

_SEGMENTS = re.compile(r"[\n|]")
_TIMED = re.compile(
    r"\s*(\d{1,6}(?:\.\d{1,3})?)\s*s?\s*-\s*(\d{1,6}(?:\.\d{1,3})?)?\s*s?\s*:(.*)", re.ASCII
)
_EXAMPLE = "as in 0-4s: he smiles | 4-9s: he frowns"


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSegment:
    """Prompt text with the frame from which it applies.

    Attributes:
        start: first video frame; the text applies until the next segment starts, or to the end.
        text: the prompt.
    """

    start: int
    text: str


def parse_prompts(text: str) -> tuple[PromptSegment, ...]:
    """Parse one prompt, or several with their times in seconds.

    Args:
        text: one prompt for the whole video; or segments, separated by line breaks or ``|``, each
            ``START-STOPs: text`` in seconds. The first must start at 0, and every other where the
            one before stops. The last applies to the end of the video and may omit STOP. A byte
            order mark, which some editors write into files, is ignored.

    Returns:
        Segments in order, at least one.

    Raises:
        RequestError: if some segments have times and others not, a segment has no text, or a
            segment does not start where the one before stops.
    """
    text = text.removeprefix("\ufeff")
    pieces = [piece for piece in _SEGMENTS.split(text) if piece.strip()]
    matches = [_TIMED.fullmatch(piece) for piece in pieces]
    if not any(matches):
        return (PromptSegment(start=0, text=text.strip()),)
    segments: list[PromptSegment] = []
    edge = Fraction(0)
    for number, (piece, match) in enumerate(zip(pieces, matches, strict=True), 1):
        if match is None:
            raise RequestError(
                f"got the prompt segment {piece.strip()[:40]!r} without a time; time all of them, "
                f"{_EXAMPLE}, or none"
            )
        start, stop = Fraction(match[1]), Fraction(match[2]) if match[2] else None
        words = match[3].strip()
        is_last = number == len(pieces)
        if start != edge:
            raise RequestError(
                f"prompt segment {number} begins at {float(start):g} s; it must begin at "
                f"{float(edge):g} s, where the one before stops"
            )
        if (stop is None and not is_last) or (stop is not None and stop <= start):
            raise RequestError(
                f"prompt segment {number} stops before it begins, or not at all; give the second "
                f"in which it stops, {_EXAMPLE}"
            )
        if not words:
            raise RequestError(f"prompt segment {number} has no text; write what the video shows")
        first = count_frames(start.numerator, start.denominator)
        segments.append(PromptSegment(start=first, text=words))
        edge = start if stop is None else stop
    return tuple(segments)
