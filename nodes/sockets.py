"""Our own socket types; everything else travels in the host's."""

from comfy_api.latest import io

CATEGORY = "TurboTalk"

# Each carries a value of turbotalk_core:
SpeechSocket = io.Custom("TURBOTALK_SPEECH")  # types.Conversation, of one speaker or several
SpeakersSocket = io.Custom("TURBOTALK_SPEAKERS")  # tuple of types.Speaker
TakeSocket = io.Custom("TURBOTALK_TAKE")  # video.take.Take
