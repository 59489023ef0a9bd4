"""Socket types of this pack; all other values use the host's types."""

from comfy_api.latest import io

CATEGORY = "TurboTalk"

# Types of the values, in turbotalk_core:
SpeechSocket = io.Custom("TURBOTALK_SPEECH")  # types.Conversation, of one speaker or several
SpeakersSocket = io.Custom("TURBOTALK_SPEAKERS")  # tuple of types.Speaker
TakeSocket = io.Custom("TURBOTALK_TAKE")  # takes.take.Take
