"""The text encoder's file: both spellings, and what is missing; and prompts cut into tokens."""

import io
from pathlib import Path

import pytest
import sentencepiece
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.family import save_text_encoder, train_tokenizer
from turbotalk_core.checkpoints.networks import load_text_encoder
from turbotalk_core.errors import CheckpointError, MismatchError
from turbotalk_core.geometry import TEXT_LENGTH
from turbotalk_core.models.text_encoder import (
    Tokenizer,
    build_text_encoder,
    build_tokenizer,
    encode_prompt,
)

FIGURES = Path(__file__).parents[2] / "golden" / "data" / "t5_tiny.safetensors"


@pytest.fixture(scope="module")
def figures() -> dict[str, Tensor]:
    return load_file(FIGURES)


@pytest.fixture
def weights(figures: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name[2:]: tensor for name, tensor in figures.items() if name.startswith("w.")}


def test_both_spellings_are_one_network(
    figures: dict[str, Tensor], weights: dict[str, Tensor]
) -> None:
    encoder = build_text_encoder(weights)
    respelt = {
        name: tensor.clone()
        for name, tensor in encoder.model.state_dict().items()
        if name != "encoder.embed_tokens.weight"
    }
    respelt["spiece_model"] = torch.zeros(3, dtype=torch.uint8)
    told = figures["ids"], figures["mask"]
    assert torch.equal(build_text_encoder(respelt)(*told), encoder(*told))


def test_the_embedding_is_one_parameter_and_moves_once(weights: dict[str, Tensor]) -> None:
    model = build_text_encoder(weights).model
    model.double()
    names = ("shared.weight", "encoder.embed_tokens.weight")
    embeddings = [model.state_dict()[name] for name in names]
    assert len({weight.data_ptr() for weight in embeddings}) == 1


def test_padding_is_not_attended_to(figures: dict[str, Tensor], weights: dict[str, Tensor]) -> None:
    encoder = build_text_encoder(weights)
    ids, mask = figures["ids"], figures["mask"]
    other = torch.where(mask.bool(), ids, ids + 1)
    tokens = mask.bool()
    torch.testing.assert_close(encoder(other, mask)[tokens], encoder(ids, mask)[tokens])


@pytest.mark.parametrize(
    "name", ["token_embedding.weight", "blocks.0.pos_embedding.embedding.weight", "norm.weight"]
)
def test_a_missing_tensor_is_refused(weights: dict[str, Tensor], name: str) -> None:
    del weights[name]
    with pytest.raises(CheckpointError, match="no complete umT5"):
        build_text_encoder(weights)


def test_an_unknown_tensor_is_refused(weights: dict[str, Tensor]) -> None:
    weights["blocks.0.attn.q.scale_weight"] = torch.ones(1)
    with pytest.raises(CheckpointError, match=r"q\.scale_weight"):
        build_text_encoder(weights)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return build_tokenizer(train_tokenizer())


def test_a_prompt_ends_with_the_end_mark(tokenizer: Tokenizer) -> None:
    (ids,) = tokenizer("a man").tolist()
    assert ids[-1] == 1
    assert 1 not in ids[:-1]
    assert tokenizer("").tolist() == [[1]]


def test_what_is_too_long_is_cut_and_ends_all_the_same(tokenizer: Tokenizer) -> None:
    (ids,) = tokenizer("a man speaks " * TEXT_LENGTH).tolist()
    assert len(ids) == TEXT_LENGTH
    assert ids[-1] == 1


@pytest.mark.parametrize("same", ["  a\n\tman  ", "a&#32;man", "&amp;#97; man"])
def test_what_a_browser_shows_alike_is_alike(tokenizer: Tokenizer, same: str) -> None:
    assert torch.equal(tokenizer(same), tokenizer("a man"))


@pytest.mark.parametrize("damaged", [b"", b"not a model"])
def test_what_is_no_tokenizer_is_refused(damaged: bytes) -> None:
    with pytest.raises(CheckpointError, match=r"no SentencePiece tokenizer; get spiece\.model"):
        build_tokenizer(damaged)


def test_a_tokenizer_without_an_end_mark_is_refused() -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a man speaks", "a dog"] * 4),
        model_writer=model,
        vocab_size=20,
        eos_id=-1,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    with pytest.raises(CheckpointError, match="no SentencePiece tokenizer"):
        build_tokenizer(model.getvalue())


@given(st.binary(max_size=300))
def test_any_bytes_are_a_tokenizer_or_refused(data: bytes) -> None:
    try:
        tokenizer = build_tokenizer(data)
    except CheckpointError:
        return
    assert tokenizer("a man").shape[0] == 1


def test_a_tokenizer_of_more_tokens_than_the_encoder_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "text_encoders"
    save_text_encoder(folder, dim=8)
    weights = load_file(folder / "bare.safetensors")
    weights["shared.weight"] = weights["shared.weight"][:5].clone()
    save_file(weights, folder / "small.safetensors")
    with pytest.raises(MismatchError, match=r"knows 20 tokens, small\.safetensors has 5"):
        load_text_encoder(folder / "small.safetensors", folder / "spiece.model")


def test_a_tokenizer_file_that_cannot_be_is_not_read(tmp_path: Path) -> None:
    folder = tmp_path / "text_encoders"
    save_text_encoder(folder, dim=8)
    with (folder / "large").open("wb") as file:
        file.truncate(2**40)  # a hole, which takes no room on the disk
    for name, message in (
        ("large", "is no tokenizer: it has more than"),
        ("a\0b", "cannot read"),
        ("a" * 300, "cannot read"),
        (".", "cannot read"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load_text_encoder(folder / "bare.safetensors", folder / name)


def test_a_prompt_alone_is_as_in_a_padded_batch(
    tokenizer: Tokenizer, weights: dict[str, Tensor]
) -> None:
    encoder = build_text_encoder(weights)
    ids = tokenizer("she speaks to him")
    length = ids.shape[1]
    padded = torch.nn.functional.pad(ids, (0, TEXT_LENGTH - length))
    rows = encoder(padded, (torch.arange(TEXT_LENGTH) < length).long()[None])[:, :length]
    torch.testing.assert_close(encode_prompt("she speaks to him", tokenizer, encoder), rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_tokenizer_inside_is_the_one_beside(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = tmp_path / "text_encoders"
    save_text_encoder(folder, dim=8)
    _, inside = load_text_encoder(folder / "whole.safetensors", dtype=dtype)
    encoder, beside = load_text_encoder(
        folder / "bare.safetensors", folder / "spiece.model", dtype=dtype
    )
    assert torch.equal(inside("a man speaks"), beside("a man speaks"))
    told = encode_prompt("a man speaks", beside, encoder)
    assert told.dtype == torch.float32
    assert told.shape == (1, beside("a man speaks").shape[1], 8)
    with pytest.raises(CheckpointError, match="no tokenizer inside"):
        load_text_encoder(folder / "bare.safetensors")
