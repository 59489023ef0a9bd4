"""Audio windows of a chunk, and the tokens that the adapter makes of them."""

import torch

from tests.golden.figures import Golden
from tests.golden.networks import build_projection
from turbotalk_core.audio.windows import take_windows
from turbotalk_core.types import AudioFeatures, Chunk


@torch.no_grad()
def test_equals_the_reference(golden: Golden) -> None:
    projection = build_projection(golden.settings["config"])
    projection.load_state_dict(golden.under("w.audio_proj."))
    features = AudioFeatures(features_TLD=golden["emb"], num_frames=len(golden["emb"]))
    starts = [name.removesuffix(".tokens") for name in golden.tensors if name.endswith(".tokens")]
    assert starts
    for start in starts:
        first, num_frames = int(start.removeprefix("s")), len(golden[f"{start}.indices"])
        chunk = Chunk(
            index=0,
            start=first,
            stop=first + num_frames,
            keep_start=first,
            keep_stop=first + num_frames,
        )
        windows = take_windows(features, chunk)
        golden.expect(f"{start}.first", windows.first_KLD[None, None])
        golden.expect(f"{start}.latter", windows.later_FKLD[None])
        tokens = projection(windows.first_KLD[None], windows.later_FKLD[None])
        golden.expect(f"{start}.tokens", tokens)
