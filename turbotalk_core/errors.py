"""Exceptions that this project raises on purpose.

Every message states what was got, what is allowed and what to do. Each class also inherits from the
builtin it specialises, or from torch's, so callers may catch either.
"""

import torch


class TurboTalkError(Exception):
    """Base class of all errors below: input that TurboTalk refuses, or work that it cannot do."""


class AudioError(TurboTalkError, ValueError):
    """The audio cannot be read or used."""


class ImageError(TurboTalkError, ValueError):
    """The reference image cannot be read or used."""


class GeometryError(TurboTalkError, ValueError):
    """A size or frame count that the model cannot take."""


class ChunkError(TurboTalkError, ValueError):
    """A chunk plan that is inconsistent, or frames that do not belong to it."""


class ScheduleError(TurboTalkError, ValueError):
    """A noise schedule that cannot be sampled."""


class RequestError(TurboTalkError, ValueError):
    """A setting outside its range, or a request that does not parse."""


class CheckpointError(TurboTalkError, ValueError):
    """A weight file that is missing, damaged or of another kind."""


class MismatchError(TurboTalkError, ValueError):
    """Two models, or a model and its input, that do not fit each other."""


class OutOfMemoryError(TurboTalkError, torch.OutOfMemoryError):
    """Work that a device has too little memory for, also in the ways that need less."""


class OutputError(TurboTalkError, OSError):
    """A result that cannot be written or read back."""


class MissingToolError(TurboTalkError, RuntimeError):
    """A program or package that a command needs is not installed."""


class RecipeError(TurboTalkError, ValueError):
    """A training recipe with an unknown key, or a setting outside its range."""


class TrainingError(TurboTalkError, RuntimeError):
    """Training run that must not continue."""
