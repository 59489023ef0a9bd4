"""Windows against plain counting."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from turbotalk_core.audio.windows import hold_last_row, null_windows, take_windows
from turbotalk_core.errors import ChunkError
from turbotalk_core.types import AudioFeatures, Chunk, FeatureRows


def _chunk(start: int, num_frames: int) -> Chunk:
    stop = start + num_frames
    return Chunk(index=0, start=start, stop=stop, keep_start=start, keep_stop=stop)


def _numbered(num_rows: int) -> AudioFeatures:
    """Features whose only value is their row."""
    rows_TLD = torch.arange(num_rows, dtype=torch.float32)[:, None, None]
    return AudioFeatures(features_TLD=rows_TLD, num_frames=num_rows)


@given(
    num_rows=st.integers(1, 200),
    start=st.integers(0, 199),
    num_later=st.integers(0, 25),
)
def test_each_window_holds_the_frames_it_covers_and_two_neighbours(
    num_rows: int, start: int, num_later: int
) -> None:
    start = min(start, num_rows - 1)
    windows = take_windows(_numbered(num_rows), _chunk(start, 4 * num_later + 1))

    def rows(first: int, last: int) -> list[int]:
        return [min(max(start + frame, 0), num_rows - 1) for frame in range(first, last + 1)]

    assert windows.first_KLD.flatten().tolist() == rows(-2, 2)
    assert windows.later_FKLD.shape == (num_later, 8, 1, 1)
    for latent, window_KLD in enumerate(windows.later_FKLD, start=1):
        covered = range(4 * latent - 3, 4 * latent + 1)
        assert window_KLD.flatten().tolist() == rows(covered[0] - 2, covered[-1] + 2)


def test_later_chunks_see_the_same_windows_as_one_long_chunk() -> None:
    features = _numbered(60)
    whole = take_windows(features, _chunk(0, 57))
    later = take_windows(features, _chunk(20, 37))
    assert torch.equal(later.later_FKLD, whole.later_FKLD[5:])


def test_null_windows_are_zeros_of_the_same_shape() -> None:
    features = AudioFeatures(features_TLD=torch.ones(30, 3, 7, dtype=torch.float64), num_frames=30)
    chunk = _chunk(4, 17)
    taken, null = take_windows(features, chunk), null_windows(features, chunk)
    assert null.first_KLD.shape == taken.first_KLD.shape
    assert null.later_FKLD.shape == taken.later_FKLD.shape
    assert null.later_FKLD.dtype == taken.later_FKLD.dtype
    assert not null.first_KLD.any()
    assert not null.later_FKLD.any()


@pytest.mark.parametrize("start", [-1, 10, 11])
def test_a_chunk_must_start_inside_the_rows(start: int) -> None:
    with pytest.raises(ChunkError, match="rows for frames 0 to 9"):
        take_windows(_numbered(10), _chunk(start, 5))


def _rows(features: FeatureRows) -> list[int]:
    return features.rows().flatten().int().tolist()


def test_a_voice_that_ends_early_is_held() -> None:
    assert _rows(hold_last_row(_numbered(3), 6)) == [0, 1, 2, 2, 2, 2]
    assert _rows(hold_last_row(_numbered(3), 2)) == [0, 1, 2]
