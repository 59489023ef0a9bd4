"""Loudness of speech."""

from tests.golden.figures import Golden
from turbotalk_core.audio.loudness import normalize_loudness


def test_equals_the_reference(golden: Golden) -> None:
    names = [name.removesuffix(".in") for name in golden.tensors if name.endswith(".in")]
    assert names
    for name in names:
        golden.expect(f"{name}.out", normalize_loudness(golden[f"{name}.in"]))
