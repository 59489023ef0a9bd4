"""The host's own InfiniteTalk node and sampler beside ours: equal settings give equal latents.

The host's node is given the features that our nodes hear, as it hears them itself in another way
(docs/compatibility.md).
"""

from types import SimpleNamespace

import pytest
import torch

from tools.benchmark.random_family import RELEASED_SIZES, TEXT_DIM, write_released_sizes

SEED = 5
SIGMAS = torch.tensor([1.0, 0.9, 0.6, 0.25, 0.0])
CHUNK_FRAMES, MOTION_FRAMES = 21, 5
NUM_LATENT_FRAMES = 6  # of a chunk


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def released(host, models, run_node):
    """A model and an adapter that both the host's node and ours take."""
    write_released_sizes(host.base / "models")
    model = run_node("UNETLoader", unet_name=RELEASED_SIZES, weight_dtype="default")
    return SimpleNamespace(
        model=model,
        patch=run_node("TurboTalkLoadAudioAdapter", name=RELEASED_SIZES),
        vae=models.vae,
    )


@pytest.fixture
def heard():
    """Sound of 3.2 s as the host's audio encoders give it: all layers, 50 rows a second."""
    return [noise(1, 160, 768, seed=seed) for seed in range(13)]


@pytest.fixture
def picture():
    return noise(1, 32, 48, 3).sigmoid()


@pytest.fixture
def prompts():
    return [[[noise(1, 512, TEXT_DIM, seed=seed), {}]] for seed in (1, 2)]


@pytest.fixture
def our_latents(host, monkeypatch, part, released, heard, picture, prompts, run_node):
    """What our sampler decodes, chunk by chunk, and the frames that it gets."""
    types = part("turbotalk_core.types")

    def make(layers=heard, **settings):
        features = host.wan_nodes.linear_interpolation(torch.cat(layers[1:]), 50, 25)
        features_TLD = features.movedim(0, 1)
        waveform = types.Waveform(samples_CS=torch.zeros(1, 51_200), sample_rate=16_000)
        features = types.AudioFeatures(features_TLD=features_TLD, num_frames=len(features_TLD))
        speech = types.Conversation(
            speakers=(types.Speaker(name="the speaker", waveform=waveform),),
            speeches=(types.Speech(features=features, waveform=waveform),),
            waveform=waveform,
        )
        chunks, decode = [], released.vae.decode

        def watch(latents):
            frames = decode(latents)
            chunks.append((latents.clone(), frames.clone()))
            return frames

        monkeypatch.setattr(released.vae, "decode", watch)
        take = run_node(
            "TurboTalkSampler",
            model=run_node(
                "TurboTalkApplyAudioAdapter",
                model=released.model,
                model_patch=released.patch,
                strength=0.8,
            ),
            vae=released.vae,
            reference_image=picture,
            speech=speech,
            positive=prompts[0],
            negative=prompts[1],
            sigmas=SIGMAS,
            update="euler",
            seed=SEED,
            size_from="custom",
            width=48,
            height=32,
            chunk_frames=CHUNK_FRAMES,
            motion_frames=MOTION_FRAMES,
            steps=1,
            shift=1.0,
            **({"audio_guidance": 1.0, "text_guidance": 1.0} | settings),
        )
        assert take.num_frames == 80
        return chunks

    return make


@pytest.fixture
def native_latents(host, released, heard, picture, prompts):
    """What the host's node and sampler make of one chunk."""

    def make(drawn, *, previous_frames=None, cfg=1.0):
        with torch.inference_mode():
            model, positive, negative, latent, _ = host.wan_nodes.WanInfiniteTalkToVideo.execute(
                mode={"mode": "single_speaker"},
                model=released.model,
                model_patch=released.patch,
                positive=prompts[0],
                negative=prompts[1],
                vae=released.vae,
                width=48,
                height=32,
                length=CHUNK_FRAMES,
                audio_encoder_output_1={"encoded_audio_all_layers": heard},
                motion_frame_count=MOTION_FRAMES,
                start_image=picture,
                audio_scale=0.8,
                previous_frames=previous_frames,
            ).result
            return host.sample.sample_custom(
                model,
                drawn,
                cfg,
                host.samplers.sampler_object("euler"),
                SIGMAS,
                positive,
                negative,
                latent["samples"],
                seed=SEED,
            )

    return make


@pytest.fixture
def draws():
    """The noise of each chunk."""
    generator = torch.Generator().manual_seed(SEED)
    return [torch.randn(1, 16, NUM_LATENT_FRAMES, 4, 6, generator=generator) for _ in range(2)]


def assert_close(got, wanted):
    assert got.shape == wanted.shape
    assert wanted.std() > 0.3
    assert (got - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_the_voice_matters(our_latents, heard):
    """Or else the tests below would not see whether it is used alike."""
    ours = our_latents()[1][0]
    other = our_latents([layer.flip(1) for layer in heard])[1][0]
    assert (ours - other).abs().max() > 1e-2 * ours.abs().max()


def test_a_first_and_a_later_chunk(host, released, our_latents, native_latents, draws):
    ours = our_latents()
    first = native_latents(draws[0])
    latent = torch.zeros_like(draws[0])
    assert torch.equal(draws[0], host.sample.prepare_noise(latent, SEED))
    assert_close(ours[0][0][:, :, 1:], first[:, :, 1:])
    # The host shows the picture's latent to the network and leaves its own guess in the result.
    assert (ours[0][0][:, :, 0] - first[:, :, 0]).abs().max() > 0.01
    later = native_latents(draws[1], previous_frames=ours[0][1][0])
    assert_close(ours[1][0], later)


def test_guidance(host, monkeypatch, released, our_latents, native_latents, draws):
    """The host's node cannot ask for two prompts at once, which its sampler does where it fits."""
    with pytest.raises(RuntimeError, match="is invalid for input of size"):
        native_latents(draws[0], cfg=3.0)
    ours = our_latents(text_guidance=3.0)[0][0]
    monkeypatch.setattr(released.model.model, "memory_required", lambda *_, **__: float("inf"))
    one_by_one = native_latents(draws[0], cfg=3.0)
    assert_close(ours[:, :, 1:], one_by_one[:, :, 1:])
    monkeypatch.undo()
    pushed = our_latents(text_guidance=3.0, audio_guidance=2.0)[0][0]
    assert pushed.isfinite().all()
    assert (pushed - ours).abs().max() > 1e-2 * ours.abs().max()
