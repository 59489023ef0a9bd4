"""Our loaders beside the host's: what they make is of one kind."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.family import AUDIO_WIDTH, NUM_AUDIO_LAYERS, write_host_family
from tools.benchmark.random_family import RELEASED_SIZES, TEXT_DIM, write_released_sizes
from turbotalk_core.checkpoints.audio_encoder import load_audio_encoder


def noise(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def test_our_audio_encoder_in_the_hosts_node(family, models, host):
    samples = noise(1, 2, 16_000)
    with torch.inference_mode():
        output = host.audio_encoder_nodes.AudioEncoderEncode.execute(
            models.audio_encoder, {"waveform": samples, "sample_rate": 16_000}
        )[0]
    wanted = load_audio_encoder(family.audio_encoder).hidden_states(samples.mean(1), None)
    assert len(output["encoded_audio_all_layers"]) == NUM_AUDIO_LAYERS + 1
    for got, layer in zip(output["encoded_audio_all_layers"], wanted, strict=True):
        assert got.shape == (1, 49, AUDIO_WIDTH)  # 50 a second
        torch.testing.assert_close(got, layer)
    torch.testing.assert_close(output["encoded_audio"], wanted[-1])
    assert output["audio_samples"] == 16_000


def test_the_hosts_audio_encoder_in_our_node(host, pack, run_node, tmp_path):
    """The same weights through the host's loader and ours are heard alike."""
    config = {
        "model_type": "wav2vec2",
        "embed_dim": 32,
        "num_heads": 2,
        "num_layers": 2,
        "conv_norm": False,
        "conv_bias": False,
        "do_normalize": False,
        "do_stable_layer_norm": False,
    }
    native = host.audio_encoders.AudioEncoderModel(config)
    for index, weight in enumerate(native.model.parameters()):
        scale = 0.02 if weight.ndim > 1 else 0.1
        generator = torch.Generator().manual_seed(index)
        weight.data = (scale * torch.randn(weight.shape, generator=generator)).to(weight)
        if weight.ndim == 1:
            weight.data += 1
    folder = host.base / "models" / "audio_encoders"
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {key: value.contiguous() for key, value in native.get_sd().items()}
    metadata = {"config": json.dumps({"num_attention_heads": 2})}
    save_file(tensors, folder / "native.safetensors", metadata)
    ours = run_node("TurboTalkLoadAudioEncoder", audio_encoder_name="native.safetensors")
    audio = {"waveform": noise(1, 1, 32_000), "sample_rate": 16_000}
    heard = [
        run_node(
            "TurboTalkEncodeSpeech", audio_encoder=encoder, audio=audio, normalize_loudness=True
        )
        .speeches[0]
        .features.rows()
        for encoder in (native, ours)
    ]
    assert heard[0].shape == heard[1].shape == (50 + 25, 2, 32)
    assert heard[1].std() > 0.1
    # the host computes in float16 here
    assert (heard[0] - heard[1]).abs().max() < 0.02 * heard[1].abs().max()
    in_sections = [
        run_node(
            "TurboTalkEncodeSpeech",
            audio_encoder=encoder,
            audio=audio,
            normalize_loudness=True,
            hearing="sections",
        )
        .speeches[0]
        .features.rows(0, 50)
        for encoder in (native, ours)
    ]
    for ours_TLD in in_sections:  # one section of whole frames
        assert (ours_TLD - heard[1][:50]).abs().max() < 0.02 * heard[1].abs().max()


def test_an_encoder_that_is_no_wav2vec2(run_node, errors):
    whisper = type("Whisper", (), {})()
    with pytest.raises(errors.MismatchError, match=r"Whisper.*wav2vec2"):
        run_node(
            "TurboTalkEncodeSpeech",
            audio_encoder=whisper,
            audio={"waveform": noise(1, 1, 16_000), "sample_rate": 16_000},
            normalize_loudness=True,
        )


def test_the_hosts_model_patch_and_ours_are_one(host, run_node, velocity):
    """One file, with 40 blocks for a model of one, through both loaders."""
    write_released_sizes(host.base / "models")
    model = run_node("UNETLoader", unet_name=RELEASED_SIZES, weight_dtype="default")
    loader = host.model_patch_nodes.ModelPatchLoader()
    patches = [
        loader.load_model_patch(RELEASED_SIZES)[0],
        run_node("TurboTalkLoadAudioAdapter", name=RELEASED_SIZES),
    ]
    answers = [
        velocity(
            run_node("TurboTalkApplyAudioAdapter", model=model, model_patch=patch, strength=1.0),
            noise(2, 32, 4),
        )
        for patch in patches
    ]
    deaf = velocity(
        run_node("TurboTalkApplyAudioAdapter", model=model, model_patch=patches[1], strength=0.0),
        noise(2, 32, 4),
    )
    assert (answers[0] - deaf).abs().max() > 0.01
    assert (answers[0] - answers[1]).abs().max() < 1e-3 * answers[0].abs().max()


def test_the_host_can_load_our_model_patch_once_more(models):
    again = models.patch.clone(force_deepcopy=True)
    assert again.model is not models.patch.model
    weights = models.patch.model.state_dict()
    assert again.model.state_dict().keys() == weights.keys()
    assert all(torch.equal(again.model.state_dict()[key], weights[key]) for key in weights)


def test_our_model_patch_in_the_hosts_infinitetalk_node(models, host, run_node):
    """The native node and sampler run with our adapter, our encoder and the family."""
    audio = {"waveform": noise(1, 1, 16_000), "sample_rate": 16_000}
    text = [[noise(1, 512, TEXT_DIM), {}]]
    with torch.inference_mode():
        encoded = host.audio_encoder_nodes.AudioEncoderEncode.execute(models.audio_encoder, audio)
        model, positive, negative, latent, _ = host.wan_nodes.WanInfiniteTalkToVideo.execute(
            mode={"mode": "single_speaker"},
            model=models.bare,
            model_patch=models.patch,
            positive=text,
            negative=text,
            vae=models.vae,
            width=32,
            height=32,
            length=9,
            audio_encoder_output_1=encoded[0],
            motion_frame_count=5,
            start_image=torch.full((1, 32, 32, 3), 0.5),
            audio_scale=1.0,
        ).result
        sampled = host.nodes.common_ksampler(
            model, 0, 2, 1.0, "euler", "normal", positive, negative, latent
        )[0]["samples"]
    assert sampled.shape == (1, 16, 3, 4, 4)
    assert sampled.isfinite().all()
    assert sampled.std() > 0.1


class TestWhatDoesNotFit:
    """Each refusal names both sides."""

    def test_an_adapter_of_another_width(self, errors, host, models, run_node, tmp_path):
        other = write_host_family(tmp_path, dim=96)
        place = host.base / "models" / "model_patches" / "wide.safetensors"
        place.write_bytes(other.adapter.read_bytes())
        wide = run_node("TurboTalkLoadAudioAdapter", name="wide.safetensors")
        with pytest.raises(
            errors.MismatchError, match=r"width 96 and 2 layers.*width 48 and 2 layers"
        ):
            run_node(
                "TurboTalkApplyAudioAdapter", model=models.bare, model_patch=wide, strength=1.0
            )

    def test_speech_of_another_encoder(self, errors, host, sample, run_node, tmp_path):
        other = write_host_family(tmp_path, audio_width=32)
        place = host.base / "models" / "audio_encoders" / "wide.safetensors"
        place.write_bytes(other.audio_encoder.read_bytes())
        encoder = run_node("TurboTalkLoadAudioEncoder", audio_encoder_name="wide.safetensors")
        speech = run_node(
            "TurboTalkEncodeSpeech",
            audio_encoder=encoder,
            audio={"waveform": noise(1, 1, 16_000), "sample_rate": 16_000},
            normalize_loudness=True,
        )
        with pytest.raises(errors.MismatchError, match=r"2 layers of 32.*\(64\).*takes 32"):
            sample(speech=speech)

    def test_two_adapters(self, errors, models, run_node):
        with pytest.raises(errors.MismatchError, match="adapter already"):
            run_node(
                "TurboTalkApplyAudioAdapter",
                model=models.model,
                model_patch=models.patch,
                strength=1.0,
            )

    def test_a_model_without_an_adapter(self, errors, models, sample):
        with pytest.raises(errors.MismatchError, match="no audio adapter"):
            sample(model=models.bare)

    def test_a_patch_that_is_no_adapter(self, errors, models, run_node):
        with pytest.raises(errors.MismatchError, match=r"WAN21.*audio adapter is needed"):
            run_node(
                "TurboTalkApplyAudioAdapter",
                model=models.bare,
                model_patch=models.bare,
                strength=1.0,
            )

    def test_a_vae_that_is_not_wans(self, errors, sample, run_node):
        pixels = run_node("VAELoader", vae_name="pixel_space")
        with pytest.raises(errors.MismatchError, match=r"3 latent channels.*16"):
            sample(vae=pixels)

    def test_a_prompt_of_another_text_encoder(self, errors, sample):
        with pytest.raises(errors.MismatchError, match=r"99 wide.*16 wide"):
            sample(positive=[[noise(1, 5, 99), {}]])

    def test_clip_vision_for_a_model_without_the_branch(self, errors, sample):
        seen = type("Seen", (), {"penultimate_hidden_states": noise(1, 257, 1280)})()
        for given in ({"clip_vision_output": seen}, {"clip_vision": seen}):
            with pytest.raises(errors.MismatchError, match=r"no image branch.*disconnect"):
                sample(**given)

    def test_files_of_another_kind(self, errors, family, host, run_node):
        folder = host.base / "models"
        (folder / "model_patches" / "vae.safetensors").write_bytes(family.vae.read_bytes())
        (folder / "audio_encoders" / "vae.safetensors").write_bytes(family.vae.read_bytes())
        with pytest.raises(errors.CheckpointError, match=r"video VAE; needed here: audio ad"):
            run_node("TurboTalkLoadAudioAdapter", name="vae.safetensors")
        with pytest.raises(errors.CheckpointError, match="not a wav2vec2"):
            run_node("TurboTalkLoadAudioEncoder", audio_encoder_name="vae.safetensors")

    def test_damaged_files(self, errors, family, host, run_node):
        place = host.base / "models" / "model_patches" / "cut.safetensors"
        place.write_bytes(family.adapter.read_bytes()[:-1000])
        with pytest.raises(errors.CheckpointError, match=r"cut\.safetensors"):
            run_node("TurboTalkLoadAudioAdapter", name="cut.safetensors")

    def test_an_adapter_with_tensors_missing(self, errors, family, host, run_node):
        tensors = load_file(family.adapter)
        del tensors["blocks.1.norm_x.bias"]
        place = host.base / "models" / "model_patches" / "incomplete.safetensors"
        save_file(tensors, place)
        with pytest.raises(errors.CheckpointError, match=r"blocks\.1\.norm_x\.bias"):
            run_node("TurboTalkLoadAudioAdapter", name="incomplete.safetensors")

    def test_the_hosts_own_sampler_on_a_model_that_hears(self, errors, models, host):
        text = [[noise(1, 512, TEXT_DIM), {}]]
        latent = {"samples": torch.zeros(1, 16, 2, 4, 4)}
        with (
            torch.inference_mode(),
            pytest.raises(errors.MismatchError, match="got no speech"),
        ):
            host.nodes.common_ksampler(
                models.model, 0, 1, 1.0, "euler", "normal", text, text, latent
            )
