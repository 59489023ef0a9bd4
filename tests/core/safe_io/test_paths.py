"""Names from strangers mean one file of their folder or are refused, and print without commands."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turbotalk_core.safe_io.paths import is_plain_name, is_shown, show

RIGHT_TO_LEFT = "\u202e"


@pytest.mark.parametrize(
    "name", ["a", "chunk_00000.mkv", "model-00001-of-00002.safetensors", "模型.safetensors",
             "Gespräch 3.mkv", ".hidden", "-", "console.log", "nullify"],
)  # fmt: skip
def test_plain_names(name: str) -> None:
    assert is_plain_name(name)


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "...", "a/b", "a\\b", "../a", "/a", "C:a", "C:\\a", "a\0", "a\n", "a\x1b[2J",
     "a.", "a ", "*.mkv", "a?", "a|b", "CON", "nul", "NUL.mkv", "aux.tar.gz", "com1", "LPT9.txt",
     "con .mkv", "CONIN$", "COM¹", f"{RIGHT_TO_LEFT}vkm.a", "\uff0e\uff0e\uff0fa", "\uff41.mkv",
     "\u200ba", "a\ufeff", "a\ud800", "x" * 256, "é" * 128, "e\u0301", None, 3, b"a", ["a"]],
)  # fmt: skip
def test_names_with_a_trick(name: object) -> None:
    assert not is_plain_name(name)


@given(st.text())
def test_a_plain_name_stays_in_its_folder(name: str) -> None:
    if is_plain_name(name):
        folder = Path("/folder")
        assert Path(os.path.normpath(folder / name)).parent == folder
        assert (folder / name).name == name


@given(st.text())
def test_what_is_shown_holds_no_command(text: str) -> None:
    shown = show(text)
    assert is_shown(shown)
    assert shown.encode().decode() == shown  # no half of a pair is left
    assert (shown == text) == is_shown(text)


def test_what_does_not_show_itself_is_spelt_out() -> None:
    assert show("a\x1b[2J\nb") == r"a\x1b[2J\nb"
    assert show(f"{RIGHT_TO_LEFT}x\ud800\x00") == r"\u202ex\ud800\x00"
    assert show("Zoë 模型 👩\u200d🚀") == "Zoë 模型 👩\u200d🚀"
