"""Identities: equal for equal videos, and different for whatever can change a frame."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from turbotalk_core.identity import digest, fingerprint, identify
from turbotalk_core.request import TalkRequest
from turbotalk_core.types import AudioFeatures, Speech, Waveform

REQUEST = TalkRequest(
    num_inference_steps=1,
    schedule="distilled",
    shift=5.0,
    update="euler",
    seed=0,
    height=32,
    width=32,
)
PICTURE = torch.rand(8, 8, 3)
SPEECH = Speech(
    features=AudioFeatures(features_TLD=torch.randn(9, 2, 3), num_frames=9),
    waveform=Waveform(samples_CS=torch.randn(2, 9 * 640), sample_rate=16_000),
)


def make(request=REQUEST, speeches=(SPEECH,), pictures=(PICTURE,), weights="w", **tensors):
    return identify(request, speeches, pictures, tensors, weights)


def test_it_is_words_and_the_same_each_time():
    identity = make(prompt=torch.ones(3), regions=None)
    assert identity == make(prompt=torch.ones(3))
    assert identity["seed"] == "0"
    assert identity["schedule"] == '"distilled"'
    assert all(isinstance(value, str) for value in identity.values())


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
            {"speeches": (replace(SPEECH, features=replace(SPEECH.features, num_frames=8)),)},
            None,  # its length is that of the take
        ),
        (
            {"speeches": (replace(SPEECH, waveform=replace(SPEECH.waveform, sample_rate=8_000)),)},
            "voice",
        ),
        ({"speeches": (SPEECH, SPEECH)}, "voice"),
    ],
)
def test_each_change_has_its_name(changes, name):
    before, now = make(), make(**changes)
    differing = [key for key in before | now if before.get(key) != now.get(key)]
    assert differing == ([] if name is None else [name])


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
