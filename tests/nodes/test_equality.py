"""The host and the core compute the same: each port on its own, then a whole take."""

import pytest
import torch

from tools.benchmark.random_family import TEXT_DIM
from turbotalk_core.audio.conversation import encode_conversation, encode_speech
from turbotalk_core.audio.io import from_samples, read_audio
from turbotalk_core.checkpoints.audio_encoder import load_audio_encoder
from turbotalk_core.checkpoints.networks import load_dit, load_vae
from turbotalk_core.conditioning.reference import prepare_reference
from turbotalk_core.conditioning.regions import find_masks, fit_regions
from turbotalk_core.loading import load_models
from turbotalk_core.models.denoiser import ProjectionAdapter, WanDenoiser
from turbotalk_core.pipeline import generate
from turbotalk_core.request import TalkRequest
from turbotalk_core.types import AudioTokens, AudioWindows, Conditioning, Speaker
from turbotalk_core.video.mux import quantize_frames

CPU = torch.device("cpu")
SAMPLE_RATE = 22_050


def assert_close(got, wanted):
    """Relative 1e-3 of the largest value, and far from trivial."""
    assert got.shape == wanted.shape
    assert wanted.std() > 1e-3
    assert (got - wanted).abs().max() < 1e-3 * wanted.abs().max()


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("sigma", [1.0, 0.7, 0.007])
@pytest.mark.parametrize(("num_words", "strength"), [(None, 1.0), (7, 0.6)])
def test_denoiser(family, models, part, run_node, sigma, num_words, strength):
    latents, reference, tokens = noise(1, 16, 3, 4, 6), noise(1, 20, 3, 4, 6), noise(3, 4, 24)
    text = None if num_words is None else noise(1, num_words, TEXT_DIM)
    denoiser = WanDenoiser(load_dit(family.dit, family.adapter)[0], strength)
    wanted = denoiser(
        latents,
        sigma,
        Conditioning(reference_BCFHW=reference, text_BND=text),
        AudioTokens(tokens_FND=tokens),
    )
    types = part("turbotalk_core.types")
    model = run_node(
        "TurboTalkApplyAudioAdapter",
        model=models.bare,
        model_patch=models.patch,
        strength=strength,
    )
    with (
        torch.inference_mode(),
        part("nodes.host.denoiser").HostDenoiser(model, torch.tensor([sigma, 0.0])) as hosted,
    ):
        got = hosted(
            latents,
            sigma,
            types.Conditioning(reference_BCFHW=reference, text_BND=text),
            types.AudioTokens(tokens_FND=tokens),
        )
    assert_close(got, wanted)


def make_regions(num_speakers):
    """Regions on a grid of 4 x 8 cells, the background of all that is left: one row."""
    regions = torch.zeros(num_speakers + 1, 4, 8)
    for index, columns in enumerate(torch.arange(8).tensor_split(num_speakers)):
        regions[index, :2, columns] = 1
    regions[-1, 2:] = 1
    return regions


@pytest.fixture
def ask_host(models, part):
    """Call the host's denoiser: ``ask_host(model, sigma, conditioning, tokens, regions)``."""

    def ask(model, latents, sigma, reference, tokens, regions=None):
        types = part("turbotalk_core.types")
        with (
            torch.inference_mode(),
            part("nodes.host.denoiser").HostDenoiser(model, torch.tensor([sigma, 0.0])) as hosted,
        ):
            return hosted(
                latents,
                sigma,
                types.Conditioning(reference_BCFHW=reference, regions_PHW=regions),
                types.AudioTokens(
                    tokens_FND=tokens, num_speakers=1 if regions is None else len(regions) - 1
                ),
            )

    return ask


@pytest.mark.parametrize("num_speakers", [2, 3])
@pytest.mark.parametrize("sigma", [1.0, 0.3])
def test_denoiser_with_several_speakers(family, models, ask_host, sigma, num_speakers):
    latents, reference = noise(1, 16, 3, 4, 8), noise(1, 20, 3, 4, 8, seed=1)
    tokens, regions = noise(3, 4 * num_speakers, 24, seed=2), make_regions(num_speakers)
    core = WanDenoiser(load_dit(family.dit, family.adapter)[0])
    conditioning = Conditioning(reference_BCFHW=reference, regions_PHW=regions)

    def ask_core(tokens, num_speakers):
        return core(
            latents,
            sigma,
            conditioning,
            AudioTokens(tokens_FND=tokens, num_speakers=num_speakers),
        )

    wanted = ask_core(tokens, num_speakers)
    got = ask_host(models.model, latents, sigma, reference, tokens, regions)
    assert_close(got, wanted)
    # not what one would get who takes the voices for one
    assert (got - ask_core(tokens, 1)).abs().max() > 1e-2 * wanted.abs().max()


def test_one_voice_is_not_looked_for(models, ask_host, part, monkeypatch):
    """Neither a lone voice nor the null voice beside several pays for telling them apart."""
    adapter, types = part("nodes.host.audio_adapter"), part("turbotalk_core.types")
    measured = []

    def count(*arguments):
        measured.append(arguments)
        return measure(*arguments)

    measure = adapter.measure_likeness
    monkeypatch.setattr(adapter, "measure_likeness", count)
    latents, reference = noise(1, 16, 3, 4, 8), noise(1, 20, 3, 4, 8, seed=1)
    with (
        torch.inference_mode(),
        part("nodes.host.denoiser").HostDenoiser(models.model, torch.tensor([1.0, 0.0])) as hosted,
    ):
        conditioning = types.Conditioning(reference_BCFHW=reference, regions_PHW=make_regions(2))
        hosted(latents, 1.0, conditioning, types.AudioTokens(tokens_FND=noise(3, 4, 24)))
        assert not measured
        two = types.AudioTokens(tokens_FND=noise(3, 8, 24), num_speakers=2)
        hosted(latents, 1.0, conditioning, two)
        assert len(measured) == 2  # once a block


def test_conditions_in_one_batch(models, part, monkeypatch):
    """Where a wrapper of another pack runs conditions side by side, each hears the voices."""
    import comfy.samplers  # the fixture put the host on the path

    latents, reference = noise(1, 16, 3, 4, 8), noise(1, 20, 3, 4, 8, seed=1)
    types = part("turbotalk_core.types")
    calc = comfy.samplers.calc_cond_batch

    def calc_twice(model, conds, noisy, timestep, options):
        first, again = calc(model, [*conds, *conds], noisy, timestep, options)
        assert torch.allclose(first, again, atol=1e-5)
        return [again]

    def ask(tokens, regions):
        with (
            torch.inference_mode(),
            part("nodes.host.denoiser").HostDenoiser(
                models.model, torch.tensor([0.5, 0.0])
            ) as hosted,
        ):
            return hosted(
                latents,
                0.5,
                types.Conditioning(reference_BCFHW=reference, regions_PHW=regions),
                types.AudioTokens(tokens_FND=tokens, num_speakers=2 if len(tokens[0]) > 4 else 1),
            )

    for tokens in (noise(3, 4, 24), noise(3, 8, 24)):
        alone = ask(tokens, make_regions(2))
        with monkeypatch.context() as patched:
            patched.setattr(comfy.samplers, "calc_cond_batch", calc_twice)
            assert_close(ask(tokens, make_regions(2)), alone)


BLOCKS = ["diffusion_model.blocks.0", "diffusion_model.blocks.1"]


@pytest.mark.parametrize("keys", [["diffusion_model"], BLOCKS])
def test_a_compiled_model_hears_every_voice(models, ask_host, keys):
    """As the host's node compiles: its guards do not look at what is in transformer_options."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper
    from comfy_extras.nodes_torch_compile import skip_torch_compile_dict

    compiled = models.model.clone()
    set_torch_compile_wrapper(
        compiled, backend="eager", keys=keys, options={"guard_filter_fn": skip_torch_compile_dict}
    )
    latents, reference = noise(1, 16, 3, 4, 8), noise(1, 20, 3, 4, 8, seed=1)
    for num_speakers in (1, 2, 1, 3):
        tokens = noise(3, 4 * num_speakers, 24, seed=2)
        regions = None if num_speakers == 1 else make_regions(num_speakers)
        asked = (latents, 0.7, reference, tokens, regions)
        assert_close(ask_host(compiled, *asked), ask_host(models.model, *asked))


def test_another_attention_tells_speakers_apart(models, ask_host):
    calls = []

    def attend(function, *arguments, **options):
        calls.append(function)
        return function(*arguments, **options)

    overridden = models.model.clone()
    overridden.model_options["transformer_options"]["optimized_attention_override"] = attend
    latents, reference = noise(1, 16, 3, 4, 8), noise(1, 20, 3, 4, 8, seed=1)
    asked = (latents, 0.7, reference, noise(3, 8, 24, seed=2), make_regions(2))
    assert_close(ask_host(overridden, *asked), ask_host(models.model, *asked))
    assert calls


def test_a_replaced_self_attention_is_no_ground_to_guess(models, ask_host, errors):
    replaced = models.model.clone()
    patches = replaced.model_options["transformer_options"]["patches"]
    del patches["attn1_patch"]
    latents, reference = noise(1, 16, 3, 4, 8), noise(1, 20, 3, 4, 8, seed=1)
    with pytest.raises(errors.MismatchError, match="replaced this MODEL's self-attention"):
        ask_host(replaced, latents, 0.7, reference, noise(3, 8, 24), make_regions(2))


def test_adapter(family, models, part):
    windows = {"first_KLD": noise(5, 2, 16), "later_FKLD": noise(3, 8, 2, 16)}
    _, projection = load_dit(family.dit, family.adapter)
    assert projection is not None
    wanted = ProjectionAdapter(projection)(AudioWindows(**windows)).tokens_FND
    with torch.inference_mode():
        hosted = part("nodes.host.audio_adapter").HostAdapter(models.patch)
        got = hosted(part("turbotalk_core.types").AudioWindows(**windows)).tokens_FND
    assert_close(got, wanted)


def test_codec(family, models, part):
    frames = noise(1, 3, 9, 32, 48).clamp(-1, 1)
    vae = load_vae(family.vae)
    with torch.inference_mode():
        vae = part("nodes.host.vae").HostVAE(models.vae)
        latents = vae.encode(frames)
        assert_close(vae.encode(frames), latents)
        picture = frames[:, :, 0]
        assert_close(vae.encode_reference(picture, 9), vae.encode_reference(picture, 9))
        assert_close(vae.decode(latents), vae.decode(latents))


def test_audio_encoder(family, models, run_node):
    samples = noise(1, 2, SAMPLE_RATE)
    wanted = encode_speech(
        from_samples(samples, SAMPLE_RATE), load_audio_encoder(family.audio_encoder)
    )
    got = run_node(
        "TurboTalkEncodeSpeech",
        audio_encoder=models.audio_encoder,
        audio={"waveform": samples, "sample_rate": SAMPLE_RATE},
        normalize_loudness=True,
    )
    (speech,) = got.speeches
    assert speech.features.num_frames == wanted.features.num_frames == 25
    assert_close(speech.features.rows(), wanted.features.rows())
    assert torch.equal(speech.waveform.samples_CS, samples[0])
    assert torch.equal(got.waveform.samples_CS, samples[0])


@pytest.mark.parametrize(
    ("update", "audio_guidance", "sigmas"),
    [("renoise", 1.0, None), ("euler", 2.0, (1.0, 0.8, 0.3, 0.0))],
)
def test_a_whole_take(family, models, run_node, update, audio_guidance, sigmas):
    """Three chunks, the last one partly beyond the end of the voice."""
    samples, picture = noise(1, 1, SAMPLE_RATE), noise(1, 70, 90, 3, seed=1).clamp(0, 1)
    request = TalkRequest(
        num_inference_steps=3 if sigmas else 2,
        schedule="distilled",
        shift=5.0,
        update=update,
        seed=7,
        height=32,
        width=48,
        audio_guidance_scale=audio_guidance,
        chunk_frames=13,
        num_motion_frames=5,
        sigmas=None if sigmas is None else tuple(torch.tensor(sigmas).tolist()),
    )
    speech = encode_speech(
        from_samples(samples, SAMPLE_RATE), load_audio_encoder(family.audio_encoder)
    )
    reference = prepare_reference(picture, 32, 48)
    chunks = generate(request, [reference], [speech], load_models(family, CPU))
    wanted = torch.cat([quantize_frames(chunk.frames_BCTHW) for chunk in chunks])

    heard = run_node(
        "TurboTalkEncodeSpeech",
        audio_encoder=models.audio_encoder,
        audio={"waveform": samples, "sample_rate": SAMPLE_RATE},
        normalize_loudness=True,
    )
    take = run_node(
        "TurboTalkSampler",
        model=models.model,
        vae=models.vae,
        reference_image=picture,
        speech=heard,
        steps=2,
        seed=7,
        size_from="custom",
        width=48,
        height=32,
        audio_guidance=audio_guidance,
        text_guidance=1.0,
        shift=5.0,
        update=update,
        chunk_frames=13,
        motion_frames=5,
        sigmas=None if sigmas is None else torch.tensor(sigmas),
    )
    got = take.read()
    assert got.shape == wanted.shape == (25, 32, 48, 3)
    assert wanted.float().std() > 1
    assert (got.int() - wanted.int()).abs().max() <= 1  # a value that rounds the other way
    assert torch.equal(read_audio(take.sound_file).samples_CS, samples[0])


def test_a_whole_take_of_two_speakers(family, models, run_node):
    """A stereo voice, then another of another rate, in a box each; guidance asks for no voice."""
    first, second, picture = noise(1, 2, 11_025), noise(1, 1, 10_000, seed=2), noise(1, 70, 90, 3)
    picture = picture.clamp(0, 1)
    boxes = (5, 5, 30, 60), (48, 3, 40, 60)
    waveforms = from_samples(first, SAMPLE_RATE), from_samples(second, 16_000)
    speakers = [
        Speaker(name=name, waveform=waveform, follows=name == "Ben", region=box)
        for name, waveform, box in zip(("Anna", "Ben"), waveforms, boxes, strict=True)
    ]
    conversation = encode_conversation(speakers, load_audio_encoder(family.audio_encoder))
    request = TalkRequest(
        num_inference_steps=2,
        schedule="distilled",
        shift=5.0,
        update="renoise",
        seed=7,
        height=32,
        width=48,
        audio_guidance_scale=2.0,
        chunk_frames=13,
        num_motion_frames=5,
    )
    masks = find_masks(speakers, (70, 90))
    assert masks is not None
    chunks = generate(
        request,
        [prepare_reference(picture, 32, 48)],
        conversation.speeches,
        load_models(family, CPU),
        regions_PHW=fit_regions(masks, 32, 48),
    )
    wanted = torch.cat([quantize_frames(chunk.frames_BCTHW) for chunk in chunks])

    introduced = ()
    for speaker, box, audio in zip(
        speakers,
        boxes,
        (
            {"waveform": first, "sample_rate": SAMPLE_RATE},
            {"waveform": second, "sample_rate": 16_000},
        ),
        strict=True,
    ):
        introduced = run_node(
            "TurboTalkSpeaker",
            name=speaker.name,
            starts="after previous" if speaker.follows else "together",
            audio=audio,
            speakers=introduced,
            **dict(zip(("x", "y", "width", "height"), box, strict=True)),
        )
    take = run_node(
        "TurboTalkSampler",
        model=models.model,
        vae=models.vae,
        reference_image=picture,
        speech=run_node(
            "TurboTalkEncodeSpeakers",
            audio_encoder=models.audio_encoder,
            speakers=introduced,
            normalize_loudness=True,
        ),
        steps=2,
        seed=7,
        size_from="custom",
        width=48,
        height=32,
        audio_guidance=2.0,
        text_guidance=1.0,
        shift=5.0,
        update="renoise",
        chunk_frames=13,
        motion_frames=5,
    )
    got = take.read()
    assert got.shape == wanted.shape == (28, 32, 48, 3)
    assert wanted.float().std() > 1
    assert (got.int() - wanted.int()).abs().max() <= 1  # a value that rounds the other way
    mix_CS = torch.cat(list(conversation.waveform.blocks()), 1)
    assert torch.equal(read_audio(take.sound_file).samples_CS, mix_CS)
