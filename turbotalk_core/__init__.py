"""TurboTalk's core: a portrait and a voice become a talking video. Independent of any host.

The names below can be imported from here; each is loaded from its module when it is first used, so
that importing the package alone is cheap.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .audio.conversation import encode_conversation as encode_conversation
    from .audio.io import open_sound as open_sound
    from .checkpoints.audio_encoder import load_audio_encoder as load_audio_encoder
    from .conditioning.reference import read_image as read_image
    from .loading import find_model_files as find_model_files
    from .loading import load_models as load_models
    from .loading import read_request as read_request
    from .pipeline import Models as Models
    from .pipeline import generate as generate
    from .render import render_video as render_video
    from .request import TalkRequest as TalkRequest
    from .takes.take import Take as Take
    from .takes.take import open_take as open_take
    from .types import Conversation as Conversation
    from .types import Speaker as Speaker
    from .video.mux import assemble as assemble

_MODULES = {  # by name
    "Conversation": ".types",
    "Models": ".pipeline",
    "Speaker": ".types",
    "Take": ".takes.take",
    "TalkRequest": ".request",
    "assemble": ".video.mux",
    "encode_conversation": ".audio.conversation",
    "find_model_files": ".loading",
    "generate": ".pipeline",
    "load_audio_encoder": ".checkpoints.audio_encoder",
    "load_models": ".loading",
    "open_sound": ".audio.io",
    "open_take": ".takes.take",
    "read_image": ".conditioning.reference",
    "read_request": ".loading",
    "render_video": ".render",
}


def __getattr__(name: str) -> Any:  # noqa: ANN401
    """Load a name from its module; PEP 562."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name], __name__), name)


def __dir__() -> list[str]:
    """List the names that can be imported from here."""
    return sorted({*globals(), *_MODULES})
