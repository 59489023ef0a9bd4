"""Several speakers in a graph: who they are, what is heard of them, and the take they make."""

import pytest
import torch
from PIL import Image

from turbotalk_core.audio.io import read_audio

RATE = 16_000
LEFT, RIGHT = {"width": 20, "height": 32}, {"x": 28, "width": 20, "height": 32}


def voice(seconds=1.0, seed=0, rate=RATE, channels=1):
    samples = torch.randn(
        1, channels, round(seconds * rate), generator=torch.Generator().manual_seed(seed)
    )
    return {"waveform": 0.1 * samples, "sample_rate": rate}


def mask(rows, columns):
    """A mask of a 48x32 picture."""
    drawn = torch.zeros(1, 32, 48)
    drawn[:, slice(*rows), slice(*columns)] = 1
    return drawn


@pytest.fixture
def introduce(run_node):
    """Chain speakers: ``introduce(("Anna", {"audio": …}), ("Ben", {}))``."""

    def chain(*people):
        speakers = ()
        for name, inputs in people:
            settings = {"starts": "together", "x": 0, "y": 0, "width": 0, "height": 0}
            speakers = run_node(
                "TurboTalkSpeaker", name=name, speakers=speakers, **(settings | inputs)
            )
        return speakers

    return chain


@pytest.fixture
def hear(models, run_node):
    """Run Encode speakers."""

    def run(speakers, normalize_loudness=True):
        return run_node(
            "TurboTalkEncodeSpeakers",
            audio_encoder=models.audio_encoder,
            speakers=speakers,
            normalize_loudness=normalize_loudness,
        )

    return run


def read(sound):
    return torch.cat(list(sound.blocks()), 1)


@pytest.fixture
def hear_one(models, run_node):
    """Run Encode speech and give its features."""

    def run(waveform):
        return (
            run_node(
                "TurboTalkEncodeSpeech",
                audio_encoder=models.audio_encoder,
                audio={"waveform": waveform, "sample_rate": RATE},
                normalize_loudness=True,
            )
            .speeches[0]
            .features.rows()
        )

    return run


@pytest.fixture
def preview(run_node):
    """Run Speakers preview on a 48x32 picture."""

    def run(speakers, picture=None):
        picture = torch.full((1, 32, 48, 3), 0.5) if picture is None else picture
        return run_node("TurboTalkSpeakersPreview", reference_image=picture, speakers=speakers)

    return run


@pytest.fixture
def sample_wide(sample):
    """Run the sampler on a 48x32 picture."""
    picture = torch.rand(1, 32, 48, 3, generator=torch.Generator().manual_seed(4))
    return lambda **changes: sample(**({"reference_image": picture, "width": 48} | changes))


class TestSpeaker:
    def test_a_chain_keeps_its_order_and_what_was_said(self, introduce):
        anna, ben, carl = introduce(
            ("Anna", {"audio": voice(), **LEFT}),
            (
                "Ben",
                {"audio": voice(0.5), "starts": "after previous", "mask": mask((0, 9), (30, 40))},
            ),
            ("Carl", {}),
        )
        assert [anna.name, ben.name, carl.name] == ["Anna", "Ben", "Carl"]
        assert [anna.follows, ben.follows, carl.follows] == [False, True, False]
        assert anna.region == (0, 0, 20, 32)
        assert torch.equal(ben.region, mask((0, 9), (30, 40))[0])
        assert (carl.waveform, carl.region) == (None, None)
        assert torch.equal(ben.waveform.samples_CS, voice(0.5)["waveform"][0])

    @pytest.mark.parametrize(
        ("inputs", "message"),
        [
            ({"mask": mask((0, 9), (0, 9)), **LEFT}, "Anna got a box and a mask"),
            ({"mask": torch.ones(2, 32, 48)}, "2 masks"),
            ({"audio": voice(0)}, "no samples"),
        ],
    )
    def test_bad_input(self, introduce, errors, inputs, message):
        with pytest.raises(errors.TurboTalkError, match=message):
            introduce(("Anna", inputs))

    def test_a_name_is_needed(self, introduce, errors):
        with pytest.raises(errors.RequestError, match="without a name"):
            introduce((" ", {"audio": voice()}))


class TestEncodeSpeakers:
    def test_unequal_lengths_end_with_the_longest(self, introduce, hear):
        long, short = voice(1.0, seed=1), voice(0.5, seed=2)
        conversation = hear(introduce(("Anna", {"audio": long}), ("Ben", {"audio": short})))
        assert [speech.features.num_frames for speech in conversation.speeches] == [25, 25]
        mix = long["waveform"][0].clone()
        mix[:, :8000] += short["waveform"][0]
        assert torch.allclose(read(conversation.waveform), mix, atol=1e-6)

    def test_one_after_the_other(self, introduce, hear):
        first, second = voice(0.4, seed=1), voice(0.8, seed=2)
        conversation = hear(
            introduce(
                ("Anna", {"audio": first}),
                ("Carl", {}),
                ("Ben", {"audio": second, "starts": "after previous"}),
            )
        )
        assert [speech.features.num_frames for speech in conversation.speeches] == [30, 30, 30]
        one_after_the_other = torch.cat((first["waveform"][0], second["waveform"][0]), 1)
        assert torch.allclose(read(conversation.waveform), one_after_the_other, atol=1e-6)

    def test_who_does_not_speak_hears_silence(self, introduce, hear, hear_one):
        conversation = hear(introduce(("Anna", {"audio": voice()}), ("Carl", {})))
        anna, carl = (speech.features.rows() for speech in conversation.speeches)
        assert torch.equal(carl, hear_one(torch.zeros(1, 1, RATE)))
        assert torch.equal(anna, hear_one(voice()["waveform"]))

    def test_a_part_of_each_voice_in_sections(self, introduce, models, run_node):
        first, second = voice(0.8, seed=1), voice(1.0, seed=2)
        conversation = run_node(
            "TurboTalkEncodeSpeakers",
            audio_encoder=models.audio_encoder,
            speakers=introduce(
                ("Anna", {"audio": first}),
                ("Carl", {}),
                ("Ben", {"audio": second, "starts": "after previous"}),
            ),
            normalize_loudness=True,
            hearing="sections",
            start_seconds=0.2,
            end_seconds=0.7,
        )
        assert [speech.features.num_frames for speech in conversation.speeches] == [25, 25, 25]
        parts = [sound["waveform"][0, :, 3_200:11_200] for sound in (first, second)]
        assert torch.allclose(read(conversation.waveform), torch.cat(parts, 1), atol=1e-6)
        for speech in conversation.speeches:
            assert speech.features.rows().shape[0] == 25 + 25

    def test_somebody_has_to_speak(self, introduce, hear, errors):
        with pytest.raises(errors.AudioError, match="none has a voice"):
            hear(introduce(("Anna", {}), ("Ben", {})))

    def test_loudness_is_left_where_asked(self, introduce, hear):
        speakers = introduce(("Anna", {"audio": voice()}), ("Ben", {"audio": voice(seed=1)}))
        for normalized, plain in zip(
            hear(speakers).speeches, hear(speakers, False).speeches, strict=True
        ):
            assert not torch.equal(normalized.features.rows(), plain.features.rows())


class TestPreview:
    def test_regions_are_drawn_inside_the_picture(self, introduce, preview):
        picture = torch.full((1, 320, 480, 3), 0.5)
        box = {"x": 300, "y": 150, "width": 100, "height": 120}
        drawn = preview(introduce(("Anna", {"width": 150, "height": 200}), ("Ben", box)), picture)
        assert drawn.shape == picture.shape
        assert drawn.dtype == torch.float32
        changed = ((drawn - picture).abs() > 1 / 255).any(-1)[0]
        assert changed[:200, :150].float().mean() > 0.99
        assert changed[150:270, 300:400].float().mean() > 0.99
        assert not changed[:, 200:250].any()
        assert not torch.equal(drawn[0, 100, 75], drawn[0, 200, 350])  # each its own colour

    def test_the_picture_is_shown_on_the_node(self, introduce, host, pack):
        node = host.nodes.NODE_CLASS_MAPPINGS["TurboTalkSpeakersPreview"]
        output = node.PREPARE_CLASS_CLONE(None).EXECUTE_NORMALIZED(
            reference_image=torch.full((1, 32, 48, 3), 0.5),
            speakers=introduce(("A", {}), ("B", {})),
        )
        (file,) = output.ui.as_dict()["images"]
        with Image.open(host.base / "temp" / file["subfolder"] / file["filename"]) as shown:
            assert shown.size == (48, 32)
            shown_bytes = torch.tensor(list(shown.convert("RGB").tobytes()), dtype=torch.uint8)
        wanted = (output.result[0][0] * 255).to(torch.uint8)
        assert torch.equal(shown_bytes, wanted.flatten())

    @pytest.mark.parametrize("picture", [torch.ones(1, 32, 48, 4), torch.ones(1, 32, 48, 1)])
    def test_transparency_and_grey(self, introduce, preview, picture):
        assert preview(introduce(("Anna", {}), ("Ben", {})), picture).shape == (1, 32, 48, 3)

    @pytest.mark.parametrize(
        ("people", "message"),
        [
            ([("Anna", LEFT), ("Ben", LEFT | {"x": 19})], "Anna.*Ben"),
            ([("Anna", LEFT), ("Ben", {"mask": mask((0, 32), (19, 30))})], "Anna.*Ben"),
            ([("Anna", LEFT), ("Ben", {"mask": mask((0, 0), (0, 0))})], "Ben"),
            ([("Anna", LEFT), ("Ben", RIGHT | {"width": 21})], "Ben.*48x32"),
            ([("Anna", LEFT), ("Ben", {"x": 30})], "Ben"),
            ([("Anna", LEFT), ("Ben", {"mask": torch.ones(1, 64, 64)})], "64x64 pixels for Ben"),
            ([("Anna", LEFT), ("Ben", {})], "Ben"),
            ([("Anna", {}), ("Ben", {}), ("Carl", {})], "Anna.*Ben.*Carl"),
            ([("Anna", LEFT)], "Anna"),
        ],
    )
    def test_mistakes_name_the_speaker(self, introduce, preview, errors, people, message):
        with pytest.raises(errors.TurboTalkError, match=message):
            preview(introduce(*people))


class TestSampler:
    def test_a_conversation_through_a_take(self, introduce, hear, sample_wide):
        anna, ben = voice(0.5, seed=1), voice(0.7, seed=2, rate=48_000, channels=2)
        people = ("Anna", {"audio": anna}), ("Ben", {"audio": ben, "starts": "after previous"})
        conversation = hear(introduce(*people))
        take = sample_wide(speech=conversation)
        assert (take.num_frames, take.height, take.width) == (30, 32, 48)
        sound = read_audio(take.sound_file)
        assert (sound.sample_rate, sound.samples_CS.shape) == (48_000, (2, 57_600))
        assert torch.equal(sound.samples_CS, read(conversation.waveform))
        # halves, drawn as boxes, left first
        halves = [{"mask": mask((1, 30), (1, 22))}, {"mask": mask((1, 30), (25, 46))}]
        drawn = [(name, inputs | half) for (name, inputs), half in zip(people, halves, strict=True)]
        assert torch.equal(sample_wide(speech=hear(introduce(*drawn))).read(), take.read())

    def test_who_speaks_where_matters(self, introduce, hear, sample_wide):
        here, there = voice(seed=1), None
        takes = []
        for left, right in ((here, there), (there, here)):
            speakers = introduce(
                ("Anna", {"audio": left, **LEFT}), ("Ben", {"audio": right, **RIGHT})
            )
            takes.append(sample_wide(speech=hear(speakers)).read())
        assert not torch.equal(*takes)

    def test_a_lone_speaker_is_a_speech(self, introduce, hear, sample_wide, models, run_node):
        speech = run_node(
            "TurboTalkEncodeSpeech",
            audio_encoder=models.audio_encoder,
            audio=voice(),
            normalize_loudness=True,
        )
        alone = hear(introduce(("Anna", {"audio": voice()})))
        assert torch.equal(sample_wide(speech=alone).read(), sample_wide(speech=speech).read())

    @pytest.mark.parametrize(
        ("people", "message"),
        [
            ([("Anna", LEFT), ("Ben", {"width": 30, "height": 32, "x": 10})], "Anna.*Ben"),
            ([("Anna", LEFT), ("Ben", {"width": 1, "height": 1, "x": 47, "y": 31})], "Ben"),
        ],
    )
    def test_mistakes_leave_nothing(
        self, introduce, hear, sample_wide, host, errors, people, message
    ):
        before = set((host.base / "temp").iterdir())
        speech = hear(introduce(*((name, box | {"audio": voice()}) for name, box in people)))
        with pytest.raises(errors.ImageError, match=message):
            sample_wide(speech=speech)
        assert set((host.base / "temp").iterdir()) == before
