"""All errors can be caught as TurboTalkError, or as the error that they specialise."""

import inspect

import pytest

from turbotalk_core import errors
from turbotalk_core.errors import TurboTalkError

KINDS = [
    kind
    for _, kind in inspect.getmembers(errors, inspect.isclass)
    if issubclass(kind, TurboTalkError) and kind is not TurboTalkError
]


def test_there_are_kinds() -> None:
    assert len(KINDS) >= 10


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_of_the_family_and_of_one_builtin(kind: type[TurboTalkError]) -> None:
    family, builtin = kind.__bases__
    assert family is TurboTalkError
    assert builtin.__module__ in ("builtins", "torch")
    assert issubclass(builtin, Exception)


@pytest.mark.parametrize("kind", KINDS)
def test_the_message_is_kept(kind: type[TurboTalkError]) -> None:
    assert str(kind("got 3, use 4")) == "got 3, use 4"
