"""Cache keys: equal for equal videos, different for everything that can change a frame."""

import json
import subprocess
import sys
import wave
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tests.core.test_sound import Chopped
from tests.family import ENCODER_CONFIG, FakeEncoder, make_request
from turbotalk_core.audio import features as features_module
from turbotalk_core.audio.conversation import encode_speech
from turbotalk_core.audio.features import SectionFeatures, describe_encoding
from turbotalk_core.audio.io import open_sound
from turbotalk_core.audio.wav2vec2 import build_audio_encoder
from turbotalk_core.errors import AudioError
from turbotalk_core.fingerprints import digest, digest_file, digest_sound, digest_text, fingerprint
from turbotalk_core.sound import Span, cut
from turbotalk_core.takes.cache_key import CacheKey, compute_cache_key
from turbotalk_core.types import AudioFeatures, Speech, Waveform

REQUEST = make_request(num_inference_steps=1, update="euler")
OTHER_FEATURES = AudioFeatures(features_TLD=torch.randn(9, 2, 3), num_frames=9)
PICTURE = torch.rand(8, 8, 3)
FEATURES = AudioFeatures(features_TLD=torch.randn(9, 2, 3), num_frames=9)
WAVEFORM = Waveform(samples_CS=torch.randn(2, 9 * 640), sample_rate=16_000)
SPEECH = Speech(features=FEATURES, waveform=WAVEFORM)


def make(request=REQUEST, speeches=(SPEECH,), pictures=(PICTURE,), weights="w", **tensors):
    return compute_cache_key(request, speeches, pictures, tensors, weights).to_json()


def test_it_is_words_and_the_same_each_time():
    fields = make(prompt=torch.ones(3), regions=None)
    assert fields == make(prompt=torch.ones(3))
    assert fields["seed"] == "0"
    assert fields["schedule"] == '"distilled"'
    assert all(isinstance(value, str) for value in fields.values())


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"request": replace(REQUEST, seed=1)}, "seed"),
        ({"request": replace(REQUEST, audio_scale=1.5)}, "audio_scale"),
        ({"pictures": (PICTURE + 1e-6,)}, "picture"),
        ({"pictures": (PICTURE, PICTURE)}, "picture"),
        ({"weights": "v"}, "weights"),
        ({"prompt": torch.ones(3)}, "prompt"),
        (
            {"speeches": (replace(SPEECH, features=replace(FEATURES, num_frames=8)),)},
            None,  # its length is that of the take
        ),
        (
            {"speeches": (replace(SPEECH, waveform=replace(WAVEFORM, sample_rate=8_000)),)},
            "voice",
        ),
        ({"speeches": (replace(SPEECH, features=OTHER_FEATURES),)}, "hearing"),
        ({"speeches": (replace(SPEECH, origin="whole"),)}, "hearing"),
    ],
)
def test_each_change_has_its_name(changes, name):
    before, now = make(), make(**changes)
    differing = [key for key in before | now if before.get(key) != now.get(key)]
    assert differing == ([] if name is None else [name])


def test_a_key_travels_as_json():
    key = CacheKey(fields=make(prompt=torch.ones(3)))
    assert CacheKey.from_json(json.loads(json.dumps(key.to_json()))) == key
    assert CacheKey.from_json({"seed": 3}).fields == {"seed": "3"}
    for value in (None, ["seed"], "seed"):
        with pytest.raises(ValueError, match="cache key"):
            CacheKey.from_json(value)


def test_whatever_else_decides_is_a_field():
    key = compute_cache_key(REQUEST, (SPEECH,), (PICTURE,), {}, "w", {"nodes before it": "5b"})
    assert key.fields["nodes before it"] == "5b"
    assert key.fields == {**make(), "nodes before it": "5b"}


def test_a_text_is_told_by_its_letters():
    assert digest_text("a") == digest_text("a") != digest_text("b")
    assert len(digest_text("a" * 99)) == len(digest(PICTURE)) == 32


def test_each_voice_counts():
    once, twice = make(), make(speeches=(SPEECH, SPEECH))
    assert {name for name in once if once[name] != twice[name]} == {"voice", "hearing"}


def test_where_a_voice_says_how_it_was_heard_its_features_are_not_asked_for():
    class Absent(AudioFeatures):
        def rows(self, start=0, stop=None):
            raise AssertionError("was asked")

    features = Absent(features_TLD=torch.zeros(9, 2, 3), num_frames=9)
    speech = Speech(features=features, waveform=WAVEFORM, origin="in sections")
    assert make(speeches=(speech,))["hearing"] == "in sections"
    with pytest.raises(AssertionError, match="was asked"):
        make(speeches=(replace(speech, origin=None),))


def write_voice(path, seconds=0.4, channels=1, seed=3):
    generator = torch.Generator().manual_seed(seed)
    samples = torch.randint(-9_000, 9_000, (round(16_000 * seconds), channels), generator=generator)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes(samples.short().numpy().tobytes())
    return path


@pytest.fixture(scope="module")
def encoder():
    return build_audio_encoder(ENCODER_CONFIG, seed=0)


@pytest.fixture
def voice(tmp_path):
    return write_voice(tmp_path / "voice.wav")


def identify_file(path, encoder, start="0", end=None, **settings):
    """Return the cache key of a part of a file, as the command line and the nodes compute it."""
    end = None if end is None else Fraction(end)
    sound = cut(open_sound(path, end), Fraction(start), end)
    return make(speeches=(encode_speech(sound, encoder, **settings),))


@pytest.mark.slow
def test_the_same_voice_is_the_same_in_another_process(voice):
    program = """
import sys
from pathlib import Path
from tests.core.takes.test_cache_key import identify_file
from tests.family import FakeEncoder
for hearing in ("whole", "sections"):
    identity = identify_file(Path(sys.argv[1]), FakeEncoder(), hearing=hearing)
    print(identity["voice"], identity["hearing"], sep="|")
"""
    told = subprocess.run(
        [sys.executable, "-c", program, voice],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[3],
    ).stdout
    here = [
        identify_file(voice, FakeEncoder(), hearing=hearing) for hearing in ("whole", "sections")
    ]
    assert told.splitlines() == [f"{each['voice']}|{each['hearing']}" for each in here]


def test_hearing_is_told_as_it_was(voice, encoder):
    auto, whole = (identify_file(voice, encoder, hearing=wish) for wish in ("auto", "whole"))
    assert auto == whole
    words = f"whole, at -23 LUFS, by {encoder.fingerprint()}"
    assert whole["hearing"] == digest_text(words)


@pytest.mark.parametrize("hearing", ["whole", "sections"])
def test_another_sound_encoder_or_setting_is_another(voice, encoder, hearing, monkeypatch):
    def differing(now):
        return {name for name in before if before[name] != now[name]}

    before = identify_file(voice, encoder, hearing=hearing)
    assert differing(identify_file(voice, encoder, hearing=hearing)) == set()
    other = "whole" if hearing == "sections" else "sections"
    assert differing(identify_file(voice, encoder, hearing=other)) == {"hearing"}
    plain = identify_file(voice, encoder, hearing=hearing, normalizes_loudness=False)
    assert differing(plain) == {"hearing"}
    stranger = build_audio_encoder(ENCODER_CONFIG, seed=1)
    assert differing(identify_file(voice, stranger, hearing=hearing)) == {"hearing"}
    for start, end in (("0.04", None), ("0", "0.36"), ("0.04", "0.36")):
        part = identify_file(voice, encoder, start, end, hearing=hearing)
        assert differing(part) == {"voice"}
    parts = [identify_file(voice, encoder, *span)["voice"] for span in (("0.1",), ("0", "0.3"))]
    assert parts[0] != parts[1]
    with monkeypatch.context() as patch:
        patch.setattr(features_module, "SECTION_FRAMES", 500)
        expected = {"hearing"} if hearing == "sections" else set()
        assert differing(identify_file(voice, encoder, hearing=hearing)) == expected
    content = bytearray(voice.read_bytes())
    content[-1] ^= 1  # one bit of the last sample
    voice.write_bytes(content)
    assert differing(identify_file(voice, encoder, hearing=hearing)) == {"voice"}


def test_sections_are_not_heard_for_an_identity(voice, encoder, monkeypatch):
    def encode(*_arguments):
        raise AssertionError("heard")

    monkeypatch.setattr(SectionFeatures, "_encode", encode)
    words = describe_encoding(encoder, False, True)
    assert identify_file(voice, encoder, hearing="sections")["hearing"] == digest_text(words)


@given(
    st.integers(1, 300), st.lists(st.integers(0, 90), min_size=1, max_size=4).filter(any), st.data()
)
def test_a_sound_is_told_by_its_samples_in_blocks_of_any_lengths(num_samples, lengths, data):
    samples_CS = torch.randn(2, num_samples, generator=torch.Generator().manual_seed(num_samples))
    sound = Chopped(samples_CS, tuple(lengths))
    told = digest_sound(sound)
    assert told == digest_sound(Waveform(samples_CS=samples_CS, sample_rate=10))
    assert told != digest_sound(Waveform(samples_CS=samples_CS, sample_rate=11))
    assert told != digest_sound(Waveform(samples_CS=samples_CS.flip(0), sample_rate=10))
    mono = Waveform(samples_CS=samples_CS.T.reshape(1, -1), sample_rate=10)
    assert told != digest_sound(mono)
    # What is cut off does not matter.
    start = data.draw(st.integers(0, num_samples - 1))
    part = Span(sound=sound, start=start, num_samples=num_samples - start)
    expected = Waveform(samples_CS=samples_CS[:, start:], sample_rate=10)
    assert digest_sound(part) == digest_sound(expected)


def test_a_file_is_told_by_its_bytes_and_is_not_decoded(tmp_path, monkeypatch):
    path = write_voice(tmp_path / "a.wav", channels=2)
    sound = open_sound(path)
    monkeypatch.setattr(type(sound), "blocks", None)
    told = digest_sound(sound)
    path.rename(tmp_path / "b.wav")
    assert told == digest_sound(replace(sound, path=tmp_path / "b.wav"))
    assert told != digest_sound(replace(sound, path=tmp_path / "b.wav", num_samples=9))
    late = Span(sound=open_sound(tmp_path / "b.wav"), start=-5, num_samples=90)
    # Cut and then laid in silence is not the same as laid in silence and then cut.
    ways = [
        late,
        Span(sound=late, start=5, num_samples=85),
        Span(sound=late, start=0, num_samples=85),
        Span(sound=Span(sound=late.sound, start=0, num_samples=85), start=-5, num_samples=90),
    ]
    assert len({digest_sound(way) for way in ways}) == 4
    (tmp_path / "b.wav").unlink()
    with pytest.raises(AudioError, match="cannot read"):
        digest_sound(late)


@given(st.binary(max_size=50), st.binary(max_size=50))
def test_files_are_told_apart(tmp_path_factory, first, second):
    folder = tmp_path_factory.mktemp("files")
    for name, content in (("first", first), ("second", second)):
        (folder / name).write_bytes(content)
    same = digest_file(folder / "first") == digest_file(folder / "second")
    assert same == (first == second)


def test_pictures_may_know_a_shorter_way():
    class Video:
        def digest(self):
            return "short"

    assert make(pictures=Video())["picture"] == "short"


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.int64, torch.bool])
def test_any_type_has_a_digest(dtype):
    zeros = torch.zeros(3, 5, dtype=dtype)
    digests = [digest(zeros), digest(zeros.T), digest(zeros.float()), digest(zeros, zeros)]
    assert len({*digests}) == 4
    assert digest(zeros) == digest(zeros.T.contiguous().T)
    assert digest(torch.tensor(1.0)) != digest(torch.tensor(2.0))


def test_a_fingerprint_tells_weights_apart():
    def make_network(seed):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(50, 70), nn.Linear(70, 3))

    def take(network):
        return fingerprint(network.state_dict().items())

    network = make_network(0)
    assert take(network) == take(make_network(0))
    others = [make_network(1), make_network(0).bfloat16(), make_network(0)[:1]]
    merged = make_network(0)
    lora = 1e-3 * torch.outer(torch.randn(70), torch.randn(50))
    merged.load_state_dict(
        {**merged.state_dict(), "0.weight": merged.state_dict()["0.weight"] + lora}
    )
    assert len({take(each) for each in (network, *others, merged)}) == 5


def test_a_fingerprint_reads_little():
    class Watched(torch.Tensor):
        read = 0

        def to(self, *arguments, **settings):
            Watched.read += self.numel()
            return super().to(*arguments, **settings)

    weight = torch.zeros(1000, 1000).as_subclass(Watched)
    fingerprint([("weight", weight)])
    assert 0 < Watched.read <= 130
