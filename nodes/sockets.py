"""Socket types of this pack; all other values use the host's types."""

from comfy_api.latest import io

from ..turbotalk_core.takes.take import Take
from ..turbotalk_core.types import Conversation

CATEGORY = "TurboTalk"

SpeechSocket = io.Custom("TURBOTALK_SPEECH")  # of one speaker or several
SpeakersSocket = io.Custom("TURBOTALK_SPEAKERS")  # a tuple of types.Speaker
TakeSocket = io.Custom("TURBOTALK_TAKE")
KINDS: dict[str, type] = {  # of the values
    "TURBOTALK_SPEECH": Conversation,
    "TURBOTALK_SPEAKERS": tuple,
    "TURBOTALK_TAKE": Take,
}
