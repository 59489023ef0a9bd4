"""Digests of texts, tensors, sounds, files and weights; and the cache key of a video.

Equal cache keys mean equal frames, so an unfinished take is continued only under an equal key.
Below all rooms, because some of them compute digests of what only they can read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

from torch import Tensor

from ..fingerprints import Digested, digest, digest_sound
from ..request import TalkRequest
from ..types import Speech

# --- fingerprints: digests of single values -----------------------------------------------------


# --- the cache key ------------------------------------------------------------------------------

_SHORT = 24  # characters of a value that a message shows


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheKey:
    """All that decides the frames of a video: equal keys mean equal frames.

    Attributes:
        fields: value by name. Names are for people; short values stand for themselves, digests for
            large ones.
    """

    fields: Mapping[str, str]

    def to_json(self) -> dict[str, str]:
        """Return the fields as one JSON object, as journals of takes store them."""
        return dict(self.fields)

    @classmethod
    def from_json(cls, value: object) -> CacheKey:
        """Read what ``to_json`` returned.

        Args:
            value: a JSON object.

        Returns:
            The key; values that are no strings are converted.

        Raises:
            ValueError: the value is no object.
        """
        if not isinstance(value, dict):
            raise ValueError(f"the cache key is a {type(value).__name__}")
        return cls(fields={str(name): str(each) for name, each in value.items()})


def identify(
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
        tensors: all other inputs of the networks, by names for people.
        weights: of ``fingerprint``.
        others: whatever else decides the frames, by names for people.

    Returns:
        Settings as they are, and digests of everything else.
    """
    settings = {field.name: json.dumps(getattr(request, field.name)) for field in fields(request)}
    # The digest of the features themselves only where nothing shorter decides them: features of
    # hours of sound never exist all at once.
    encoded = [
        digest(speech.features.rows()) if speech.origin is None else speech.origin
        for speech in speeches
    ]
    shown = pictures.digest() if isinstance(pictures, Digested) else digest(*pictures)
    digests = {name: digest(tensor) for name, tensor in tensors.items() if tensor is not None}
    return CacheKey(
        fields={
            **(others or {}),
            **settings,
            "hearing": "; ".join(encoded),  # replaces the setting, which "auto" leaves open
            "voice": ", ".join(digest_sound(speech.waveform) for speech in speeches),
            "picture": shown,
            "weights": weights,
            **digests,
        }
    )


def describe_changes(before: CacheKey, now: CacheKey) -> tuple[str, ...]:
    """Describe how two keys differ.

    Args:
        before: of a take that was begun.
        now: of the video that is wanted.

    Returns:
        A phrase for each difference, as in "seed was 0 and is 1"; none where both are equal.
    """
    phrases = []
    for name in sorted({*before.fields, *now.fields}):
        old, new = before.fields.get(name, "none"), now.fields.get(name, "none")
        if old == new:
            continue
        if name == "hearing" and ", by " in old:  # a sentence, where digests stand since
            phrases.append(
                "hearing was recorded by an earlier version of this program, in another form"
            )
        elif max(len(old), len(new)) <= _SHORT:
            phrases.append(f"{name} was {old} and is {new}")
        else:
            phrases.append(f"{name} is another")
    return tuple(phrases)
