"""Every spelling of an audio encoder's file, and every damage to one."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.family import ENCODER_CONFIG
from turbotalk_core.audio.wav2vec2 import EncoderConfig, Wav2Vec2Encoder, build_audio_encoder
from turbotalk_core.checkpoints.audio_encoder import load_audio_encoder, save_audio_encoder
from turbotalk_core.errors import CheckpointError, OutputError

DATA = Path(__file__).parents[2] / "golden" / "data"
HEADS = {"config": json.dumps({"num_attention_heads": 4})}


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return load_file(DATA / "wav2vec_tiny.safetensors")


@pytest.fixture(scope="module")
def weights(golden: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key[2:]: value for key, value in golden.items() if key.startswith("w.")}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "encoder.safetensors"


def _assert_near(result: torch.Tensor, expected: torch.Tensor) -> None:
    assert result.shape == expected.shape
    assert (result - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_public_spellings_and_extras_change_nothing(
    file: Path, golden: dict[str, torch.Tensor], weights: dict[str, torch.Tensor]
) -> None:
    def spell(key: str) -> str:
        key = key.replace("parametrizations.weight.original0", "weight_g")
        return "wav2vec2." + key.replace("parametrizations.weight.original1", "weight_v")

    spelt = {spell(key): value for key, value in weights.items() if key != "masked_spec_embed"}
    for extra in (
        "quantizer.codevectors",
        "project_q.weight",
        "project_hid.bias",
        "lm_head.weight",
    ):
        spelt[extra] = torch.zeros(3)
    save_file(spelt, file, HEADS)
    _assert_near(load_audio_encoder(file).encode(golden["wav"], 31), golden["embedding"])


def test_half_precision_files_compute_in_float32(
    file: Path, golden: dict[str, torch.Tensor], weights: dict[str, torch.Tensor]
) -> None:
    save_file({key: value.half() for key, value in weights.items()}, file, HEADS)
    result = load_audio_encoder(file).encode(golden["wav"], 31)
    assert result.dtype == torch.float32
    assert (result - golden["embedding"]).abs().max() < 2e-2 * golden["embedding"].abs().max()


def _shapes(config: EncoderConfig) -> dict[str, torch.Tensor]:
    model = build_audio_encoder(config, seed=0).model
    return {key: value.clone() for key, value in model.state_dict().items()}


def test_geometry_of_a_published_layout_follows_from_the_shapes(file: Path) -> None:
    config = EncoderConfig(
        hidden_size=128,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=40,
        conv_dim=(8, 8, 8, 8, 8, 8, 12),
        num_conv_pos_embeddings=10,
        num_conv_pos_embedding_groups=4,
    )
    save_file(_shapes(config), file)
    assert load_audio_encoder(file).config == config


def test_a_large_layout_normalises_every_convolution_and_its_layers_first(file: Path) -> None:
    config = replace(
        ENCODER_CONFIG,
        hidden_size=64,
        num_attention_heads=1,
        conv_bias=True,
        feat_extract_norm="layer",
        do_stable_layer_norm=True,
    )
    save_file(_shapes(config), file)
    encoder = load_audio_encoder(file)
    assert encoder.config == config
    noise_BS = torch.randn(1, 4_000, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        states = encoder.hidden_states(noise_BS, None)
        expected = encoder.model(noise_BS).last_hidden_state
    assert torch.equal(states[-1], expected)


def test_a_saved_encoder_loads_as_the_same(file: Path) -> None:
    encoder = build_audio_encoder(ENCODER_CONFIG, seed=3)
    save_audio_encoder(encoder, file, {"turbotalk": "{}"})
    loaded = load_audio_encoder(file)
    noise_S = torch.randn(8_000, generator=torch.Generator().manual_seed(0))
    assert loaded.config == ENCODER_CONFIG
    assert torch.equal(loaded.encode(noise_S, 12), encoder.encode(noise_S, 12))
    assert not loaded.model.training
    assert [path.name for path in file.parent.iterdir()] == [file.name]


@pytest.mark.parametrize(
    "key",
    [
        "encoder.layers.1.attention.k_proj.weight",
        "encoder.pos_conv_embed.conv.parametrizations.weight.original0",
        "encoder.layer_norm.weight",
        "feature_extractor.conv_layers.3.conv.weight",
    ],
)
def test_a_missing_tensor_is_named(file: Path, key: str) -> None:
    state = _shapes(ENCODER_CONFIG)
    del state[key]
    save_file(state, file, HEADS)
    with pytest.raises(CheckpointError, match=key.replace(".", r"\.")):
        load_audio_encoder(file)


def test_wrong_and_unknown_tensors_are_named(file: Path) -> None:
    state = _shapes(ENCODER_CONFIG)
    state["encoder.layers.0.layer_norm.bias"] = torch.zeros(5)
    state["encoder.layers.0.adapter_layer.norm.bias"] = torch.zeros(5)
    save_file(state, file, HEADS)
    with pytest.raises(
        CheckpointError, match=r"unknown: .*adapter.*wrong shape: .*\(5,\).*\(16,\)"
    ):
        load_audio_encoder(file)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "number of heads of a 16 wide"),
        ({"config": "{"}, "no JSON"),
        ({"config": "[4]"}, "no JSON object"),
        ({"config": '{"num_attention_heads": 3}'}, "3 heads do not divide the width 16"),
        ({"config": '{"num_attention_heads": 2, "hidden_size": 32}'}, "wrong shape"),
        ({"config": '{"num_attention_heads": 2, "feat_extract_norm": "batch"}'}, "batch"),
        ({"config": '{"num_attention_heads": 2, "conv_stride": [5, 2]}'}, "conv"),
        ({"config": '{"num_attention_heads": 0}'}, "got num_attention_heads 0"),
        ({"config": '{"num_attention_heads": "2"}'}, "got num_attention_heads '2'"),
        ({"config": '{"num_attention_heads": true}'}, "got num_attention_heads True"),
        (
            {"config": '{"num_attention_heads": 2, "num_hidden_layers": 999999999}'},
            "at most|layers",
        ),
        ({"config": '{"num_attention_heads": 2, "num_hidden_layers": 3}'}, "tells of 3 layers"),
        (
            {"config": '{"num_attention_heads": 2, "conv_stride": [1000000,1,1,1,1,1,1]}'},
            "a second",
        ),
        ({"config": '{"num_attention_heads": 2, "conv_stride": [5,2,2,2,2,2,0]}'}, "conv_stride"),
        ({"config": '{"num_attention_heads": 2, "conv_stride": []}'}, "conv_stride"),
        ({"config": '{"num_attention_heads": 2, "layer_norm_eps": -1}'}, "layer_norm_eps"),
        ({"config": '{"num_attention_heads": 2, "layer_norm_eps": NaN}'}, "NaN"),
        ({"config": '{"num_attention_heads": 2, "conv_bias": "no"}'}, "conv_bias"),
        ({"config": '{"a": ' * 100_000}, "nested too deeply"),
        ({"config": "9" * 5_000}, "20 digits"),
    ],
)
def test_geometry_that_cannot_be_is_refused(
    file: Path, metadata: dict[str, str], message: str
) -> None:
    save_file(_shapes(ENCODER_CONFIG), file, metadata)
    with pytest.raises(CheckpointError, match=message):
        load_audio_encoder(file)


def test_another_number_of_convolutions_needs_its_strides(file: Path) -> None:
    config = replace(
        ENCODER_CONFIG,
        hidden_size=64,
        num_attention_heads=1,
        conv_dim=(8, 8),
        conv_kernel=(10, 8),
        conv_stride=(10, 32),
    )
    save_file(_shapes(config), file)
    with pytest.raises(CheckpointError, match="conv_stride"):
        load_audio_encoder(file)
    save_file(_shapes(config), file, {"config": json.dumps({"conv_stride": [10, 32]})})
    assert load_audio_encoder(file).config == config


def test_what_is_no_encoder_file_is_refused(file: Path) -> None:
    with pytest.raises(CheckpointError, match="no audio encoder file"):
        load_audio_encoder(file)
    file.write_bytes(b"not a checkpoint")
    with pytest.raises(CheckpointError, match="cannot be read as safetensors"):
        load_audio_encoder(file)
    save_file({"decoder.conv1.weight": torch.zeros(2)}, file)
    with pytest.raises(CheckpointError, match="is not a wav2vec2"):
        load_audio_encoder(file)


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        ("encoder.layer_norm.weight", ()),
        ("encoder.layer_norm.weight", (0,)),
        ("feature_extractor.conv_layers.0.conv.weight", (8,)),
        ("encoder.pos_conv_embed.conv.parametrizations.weight.original1", (16, 32, 8)),
        ("encoder.pos_conv_embed.conv.parametrizations.weight.original1", (16,)),
        ("encoder.layers.0.feed_forward.intermediate_dense.weight", ()),
    ],
)
def test_shapes_that_cannot_be_are_refused(file: Path, key: str, shape: tuple[int, ...]) -> None:
    save_file(_shapes(ENCODER_CONFIG) | {key: torch.zeros(shape)}, file, HEADS)
    with pytest.raises(CheckpointError, match="encoder"):
        load_audio_encoder(file)


@pytest.mark.parametrize("name", ["a\0.safetensors", "a" * 300, "."])
def test_a_name_that_cannot_be_is_no_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match="no audio encoder file"):
        load_audio_encoder(tmp_path / name)


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    encoder: Wav2Vec2Encoder = build_audio_encoder(ENCODER_CONFIG, seed=0)
    with pytest.raises(OutputError, match=r"at .*missing/a\.safetensors"):
        save_audio_encoder(encoder, tmp_path / "missing" / "a.safetensors")
    target = tmp_path / "folder.safetensors"
    target.mkdir()
    with pytest.raises(OutputError, match=f"at .*{target.name}"):
        save_audio_encoder(encoder, target)
    assert [path.name for path in tmp_path.iterdir()] == [target.name]
