"""Timed prompts: round trips, and errors for ambiguous ones."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turbotalk_core.conditioning.prompts import PromptSegment, parse_prompts
from turbotalk_core.errors import RequestError, TurboTalkError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a man talks", [(0, "a man talks")]),
        (
            "  a man: talks, 3-4 words | more\nand more ",
            [(0, "a man: talks, 3-4 words | more\nand more")],
        ),
        ("", [(0, "")]),
        ("0-4s: he smiles | 4-9s: he frowns", [(0, "he smiles"), (100, "he frowns")]),
        ("0-4:a\n\n4 s - 9.5 s : b: c\n9.5-:d", [(0, "a"), (100, "b: c"), (237, "d")]),
        ("0-0.04s: a | 0.04-s: b", [(0, "a"), (1, "b")]),
        ("\ufeff0-4s: a\r\n4-9s: b\r\n\r\n", [(0, "a"), (100, "b")]),
        ("\ufeffa man talks\r\n\r\n", [(0, "a man talks")]),
    ],
)
def test_what_is_written_is_read(text, expected):
    assert parse_prompts(text) == tuple(PromptSegment(start=s, text=t) for s, t in expected)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("0-4s: a | b", "'b' without a time"),
        ("1-4s: a", "segment 1 begins at 1 s; it must begin at 0 s"),
        ("0-4s: a | 5-6s: b", "segment 2 begins at 5 s; it must begin at 4 s"),
        ("0-4s: a | 3-6s: b", "segment 2 begins at 3 s; it must begin at 4 s"),
        ("0-: a | 3-6s: b", "segment 1 stops before"),
        ("0-4s: a | 4-4s: b", "segment 2 stops before"),
        ("0-4s:  | 4-5s: b", "segment 1 has no text"),
    ],
)
def test_what_cannot_be_meant_is_refused(text, told):
    with pytest.raises(RequestError, match=told):
        parse_prompts(text)


WORDS = st.text(st.characters(exclude_characters="|", exclude_categories=["C", "Z"]), min_size=1)


@given(st.lists(st.tuples(st.integers(1, 9_000), WORDS), min_size=1))
def test_any_schedule_comes_back(parts):
    edge, expected = 0, []
    for frames, words in parts:
        expected.append(PromptSegment(start=edge, text=words))
        edge += frames
    pieces = [
        f"{s.start * 0.04:.2f}-{stop * 0.04:.2f}s: {s.text}"
        for s, stop in zip(expected, [*(e.start for e in expected[1:]), edge], strict=True)
    ]
    assert parse_prompts("\n".join(pieces)) == tuple(expected)


@given(st.text() | st.text("0123456789.-s: |\n"))
def test_any_text_is_read_or_refused(text):
    try:
        segments = parse_prompts(text)
    except TurboTalkError:
        return
    assert segments[0].start == 0
