"""Our own socket types; everything else travels in the host's."""

from comfy_api.latest import io

CATEGORY = "TurboTalk"

SpeechSocket = io.Custom("TURBOTALK_SPEECH")  # carries turbotalk_core.types.Speech
TakeSocket = io.Custom("TURBOTALK_TAKE")  # carries turbotalk_core.video.take.Take
