"""The VAE with any split of the frames, and with new weights."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.family import build_vae
from turbotalk_core.conditioning.reference import reference_clip
from turbotalk_core.errors import GeometryError, MismatchError
from turbotalk_core.geometry import count_decoded_frames, count_latent_frames
from turbotalk_core.models.vae import WanVAE
from turbotalk_core.models.vae_layers import Encoder, Stream
from turbotalk_core.protocols import VideoVAE

DATA = Path(__file__).parents[2] / "golden" / "data"
NUM_FRAMES = 17
NUM_LATENTS = 5


@pytest.fixture(scope="module")
def vae() -> WanVAE:
    vae = WanVAE(4)
    vae.load_state_dict(load_file(DATA / "vae_weights.safetensors"))
    return vae.requires_grad_(False)


@pytest.fixture(scope="module")
def exact_vae(vae: WanVAE) -> WanVAE:
    """VAE in float64, where sums in another order differ by less than any mistake."""
    return copy.deepcopy(vae).double()


def _draw_frames(num_frames: int, *, batch: int = 1, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, 3, num_frames, 16, 24, generator=generator) * 2 - 1


def _draw_latents(num_latents: int, *, batch: int = 1) -> Tensor:
    return torch.randn(batch, 16, num_latents, 2, 3, generator=torch.Generator().manual_seed(0))


def _assert_near(result: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    assert result.shape == expected.shape
    assert (result - expected).abs().max() <= tolerance * expected.abs().max()


def _split(clip: Tensor, cuts: set[int]) -> tuple[Tensor, ...]:
    return clip.tensor_split(sorted(cuts), dim=2)


@given(cuts=st.sets(st.integers(1, NUM_FRAMES - 1)))
@settings(max_examples=10)
def test_any_split_of_the_frames_encodes_to_the_same(exact_vae: WanVAE, cuts: set[int]) -> None:
    frames = _draw_frames(NUM_FRAMES).double()
    stream: Stream = {}
    pieces = [exact_vae.encode_stream(piece, stream) for piece in _split(frames, cuts)]
    _assert_near(torch.cat(pieces, 2), exact_vae.encode_stream(frames, {}), 1e-12)


@pytest.mark.parametrize("num_frames", [1, 5, 9, 33, 81, 161])
def test_a_picture_and_grey_encode_to_the_very_same(vae: WanVAE, num_frames: int) -> None:
    picture = _draw_frames(1, batch=2)[:, :, 0]
    latents = vae.encode_reference(picture, num_frames)
    assert torch.equal(latents, vae.encode(reference_clip(picture, num_frames)))


def test_of_a_picture_and_grey_what_repeats_is_encoded_once(vae: WanVAE) -> None:
    picture = _draw_frames(1)[:, :, 0]
    whole = _count_frames(vae.encoder, lambda: vae.encode(reference_clip(picture, 81)))
    assert whole == [81] * 7 + [41] * 3 + [21] * 6
    # Each convolution of a stage puts off by two frames of its rate what repeats.
    saving = _count_frames(vae.encoder, lambda: vae.encode_reference(picture, 81))
    assert saving == [5, 9, 13, 13, 17, 21, 23, 16, 20, 41, 21, 21, 21, 21, 21, 21]


def _count_frames(encoder: Encoder, encode: Callable[[], Tensor]) -> list[int]:
    """Count the frames that each stage receives."""
    stages = (encoder.conv1, *encoder.downsamples, *encoder.middle, encoder.head)
    counts = dict.fromkeys(stages, 0)

    def count(stage: nn.Module, given: tuple[Tensor, Stream]) -> None:
        counts[stage] += len(given[0])

    hooks = [stage.register_forward_pre_hook(count) for stage in stages]
    encode()
    for hook in hooks:
        hook.remove()
    return list(counts.values())


def test_a_stream_keeps_no_more_than_it_needs(vae: WanVAE) -> None:
    """Views of what is remembered would keep everything that they are views of."""
    encoding: Stream = {}
    decoding: Stream = {}
    vae.encode_stream(_draw_frames(9), encoding)
    vae.decode_stream(_draw_latents(3), decoding)
    for kept in (*encoding.values(), *decoding.values()):
        assert kept.untyped_storage().nbytes() == kept.nbytes
        assert len(kept) <= 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the compiler
def test_one_graph_is_a_step(vae: WanVAE) -> None:
    latents, frames = _draw_latents(4), _draw_frames(11)
    for step, clip in ((vae.decode_stream, latents), (vae.encode_stream, frames)):
        first, second, last = clip.tensor_split((1, clip.shape[2] - 2), 2)
        streams: tuple[Stream, Stream] = ({}, {})
        for stream in streams:
            step(first, stream)
            step(second, stream)
        compiled = torch.compile(step, backend="eager", fullgraph=True)
        assert torch.equal(compiled(last, streams[0]), step(last, streams[1]))
        for module, kept in streams[0].items():
            assert torch.equal(kept, streams[1][module])


@given(cuts=st.sets(st.integers(1, NUM_LATENTS - 1)))
@settings(max_examples=10)
def test_any_split_of_the_latents_decodes_to_the_same(exact_vae: WanVAE, cuts: set[int]) -> None:
    latents = _draw_latents(NUM_LATENTS).double()
    stream: Stream = {}
    pieces = [exact_vae.decode_stream(piece, stream) for piece in _split(latents, cuts)]
    _assert_near(torch.cat(pieces, 2), exact_vae.decode_stream(latents, {}), 1e-12)


def test_a_latent_comes_out_with_the_last_of_its_frames(vae: WanVAE) -> None:
    stream: Stream = {}
    frames = _draw_frames(9).split(1, 2)
    counts = [vae.encode_stream(frame, stream).shape[2] for frame in frames]
    assert counts == [1, 0, 0, 0, 1, 0, 0, 0, 1]


@pytest.mark.parametrize("num_latents", [1, 2, 3, 4, 6])
def test_whole_clips_are_one_and_then_fours(exact_vae: WanVAE, num_latents: int) -> None:
    num_frames = count_decoded_frames(num_latents)
    frames = _draw_frames(num_frames).double()
    latents = exact_vae.encode(frames)
    assert latents.shape == (1, 16, num_latents, 2, 3)
    assert count_latent_frames(num_frames) == num_latents
    _assert_near(latents, exact_vae.encode_stream(frames, {}), 1e-12)
    decoded = exact_vae.decode(latents)
    assert decoded.shape == frames.shape
    _assert_near(decoded, exact_vae.decode_stream(latents, {}), 1e-12)


def test_the_future_does_not_change_the_past(vae: WanVAE) -> None:
    frames = _draw_frames(17)
    other = torch.cat((frames[:, :, :9], _draw_frames(8, seed=1)), 2)
    latents, other_latents = vae.encode(frames), vae.encode(other)
    assert torch.equal(latents[:, :, :3], other_latents[:, :, :3])
    assert not torch.equal(latents[:, :, 3], other_latents[:, :, 3])


def test_decoding_in_pieces_keeps_them_short(vae: WanVAE) -> None:
    latents = _draw_latents(5)
    pieces = list(vae.iter_decode(latents))
    assert [piece.shape[2] for piece in pieces] == [1, 4, 4, 4, 4]
    assert torch.equal(torch.cat(pieces, 2), vae.decode(latents))


def test_a_batch_is_as_its_clips_alone(exact_vae: WanVAE) -> None:
    frames = _draw_frames(9, batch=2).double()
    latents = exact_vae.encode(frames)
    _assert_near(latents, torch.cat([exact_vae.encode(clip) for clip in frames.split(1)]), 1e-12)
    decoded = exact_vae.decode(latents)
    _assert_near(decoded, torch.cat([exact_vae.decode(clip) for clip in latents.split(1)]), 1e-12)


def test_results_have_the_dtype_of_the_weights() -> None:
    vae: VideoVAE = build_vae(4).bfloat16()
    latents = vae.encode(_draw_frames(5))
    assert latents.dtype == torch.bfloat16
    assert vae.decode(latents.float()).dtype == torch.bfloat16


def test_whole_clips_keep_no_gradient_and_leave_the_callers_mode_alone() -> None:
    vae = build_vae(4)
    latents = vae.encode(_draw_frames(5))
    assert not latents.requires_grad
    for frames in vae.iter_decode(latents):
        assert not frames.requires_grad
        assert torch.is_grad_enabled()


@pytest.mark.parametrize("num_frames", [2, 4, 16])
def test_other_frame_counts_are_refused(vae: WanVAE, num_frames: int) -> None:
    with pytest.raises(GeometryError, match=f"got {num_frames} frames"):
        vae.encode(_draw_frames(num_frames))
    with pytest.raises(GeometryError, match=f"got {num_frames} frames"):
        vae.encode_reference(_draw_frames(1)[:, :, 0], num_frames)


@pytest.mark.parametrize(("height", "width"), [(12, 16), (16, 20), (7, 8)])
def test_odd_sizes_are_refused(vae: WanVAE, height: int, width: int) -> None:
    with pytest.raises(GeometryError, match=f"got {width}x{height} frames.*multiples of 8"):
        vae.encode(torch.zeros(1, 3, 1, height, width))
    with pytest.raises(GeometryError, match=f"got {width}x{height} frames.*multiples of 8"):
        vae.encode_reference(torch.zeros(1, 3, height, width), 5)


def test_other_channels_are_refused(vae: WanVAE) -> None:
    with pytest.raises(MismatchError, match="3 colour channels, got 4"):
        vae.encode(torch.zeros(1, 4, 1, 16, 16))
    with pytest.raises(MismatchError, match="3 colour channels, got 1"):
        vae.encode_reference(torch.zeros(1, 1, 16, 16), 5)


def test_new_weights_work_and_all_of_them_learn() -> None:
    vae = build_vae(4)
    frames = _draw_frames(9)
    mean, log_variance = vae.posterior(frames)
    decoded = vae.reconstruct(mean)
    assert decoded.shape == frames.shape
    (decoded.square().mean() + log_variance.square().mean()).backward()
    for name, weight in vae.named_parameters():
        assert weight.grad is not None, name
        assert weight.grad.isfinite().all(), name
        assert weight.grad.any(), name


def test_new_weights_begin_with_little_posterior_noise() -> None:
    mean, log_variance = build_vae(4).posterior(_draw_frames(9))
    assert log_variance.exp().mean() < 0.01 * mean.var()


def test_new_weights_follow_from_the_seed() -> None:
    first, second = (build_vae(4).state_dict() for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_new_weights_show_a_still_clip_as_its_one_picture() -> None:
    vae, frames = build_vae(4), _draw_frames(1)
    shown = vae.decode(vae.encode(frames))
    still = vae.decode(vae.encode(frames.expand(-1, -1, 9, -1, -1)))
    _assert_near(still, shown.expand_as(still))
