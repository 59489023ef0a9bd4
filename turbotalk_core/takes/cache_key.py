"""Cache key of a video: the settings, digests and fingerprints that determine its frames.

Equal cache keys mean equal frames, so an unfinished take is continued only if its key is equal.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

from torch import Tensor

from ..fingerprints import Digested, digest, digest_sound
from ..request import TalkRequest
from ..types import Speech

_SHORT = 24  # characters of the longest value that a message contains


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheKey:
    """All inputs that determine the frames of a video: equal keys mean equal frames.

    Attributes:
        fields: value by name. Names are readable, as messages contain them; short values are
            stored as they are, large ones as digests.
    """

    fields: Mapping[str, str]

    def to_json(self) -> dict[str, str]:
        """Return the fields as one JSON object, as journals of takes store them."""
        return dict(self.fields)

    @classmethod
    def from_json(cls, value: object) -> CacheKey:
        """Parse the result of ``to_json``.

        Args:
            value: a JSON object.

        Returns:
            The key; values that are no strings are converted.

        Raises:
            ValueError: if the value is no object.
        """
        if not isinstance(value, dict):
            raise ValueError(f"the cache key is a {type(value).__name__}")
        return cls(fields={str(name): str(each) for name, each in value.items()})


def compute_cache_key(
    request: TalkRequest,
    speeches: Sequence[Speech],
    pictures: Sequence[Tensor] | Digested,
    tensors: Mapping[str, Tensor | None],
    weights: str,
    others: Mapping[str, str] | None = None,
) -> CacheKey:
    """Compute the cache key of a video.

    Args:
        request: all settings.
        speeches: one per speaker.
        pictures: the portrait, or the frames of a video to dub.
        tensors: all other inputs of the networks, by readable names.
        weights: result of ``fingerprint``.
        others: all else that determines the frames, by readable names.

    Returns:
        Settings as they are, and digests of everything else.
    """
    settings = {field.name: json.dumps(getattr(request, field.name)) for field in fields(request)}
    # A digest of the features themselves only if their origin is not known: the features of hours
    # of sound are never in memory at the same time.
    encoded = [
        digest(speech.features.rows()) if speech.origin is None else speech.origin
        for speech in speeches
    ]
    picture_digest = pictures.digest() if isinstance(pictures, Digested) else digest(*pictures)
    digests = {name: digest(tensor) for name, tensor in tensors.items() if tensor is not None}
    return CacheKey(
        fields={
            **(others or {}),
            **settings,
            "hearing": "; ".join(encoded),  # replaces the setting, which may be "auto"
            "voice": ", ".join(digest_sound(speech.waveform) for speech in speeches),
            "picture": picture_digest,
            "weights": weights,
            **digests,
        }
    )


def describe_changes(before: CacheKey, now: CacheKey) -> tuple[str, ...]:
    """Describe how two keys differ.

    Args:
        before: key of an unfinished take.
        now: key of the requested video.

    Returns:
        A phrase for each difference, as in "seed was 0 and is 1"; none if both are equal.
    """
    phrases = []
    for name in sorted({*before.fields, *now.fields}):
        old, new = before.fields.get(name, "none"), now.fields.get(name, "none")
        if old == new:
            continue
        if name == "hearing" and ", by " in old:  # a sentence, in place of today's digests
            phrases.append(
                "hearing was recorded by an earlier version of this program, in another form"
            )
        elif max(len(old), len(new)) <= _SHORT:
            phrases.append(f"{name} was {old} and is {new}")
        else:
            phrases.append(f"{name} is another")
    return tuple(phrases)
