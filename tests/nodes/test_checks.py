"""What leaves a node as an error: public names, and no folder of the server."""

import errno

import pytest
import torch


@pytest.fixture
def hide(part):
    return part("nodes.host.folders").hide_folders


def test_folders_of_the_host_have_short_names(hide, host):
    base = host.base
    for folder, shown in (
        (base / "output" / "turbotalk_takes" / "ab", "output/turbotalk_takes/ab"),
        (base / "input" / "a b.png", "input/a b.png"),
        (base / "temp", "temp"),
        (base / "models" / "vae" / "x.safetensors", "vae/x.safetensors"),
        (base / "else" / "x", "ComfyUI/else/x"),
    ):
        assert hide(f"{folder} is missing") == f"{shown} is missing"
        assert hide(f"got 'no space' at {folder}; free some") == (
            f"got 'no space' at {shown}; free some"
        )
        assert hide(f"'{folder}', '{folder}'") == f"'{shown}', '{shown}'"
    assert hide(f"{base}-other/x") == "x"  # no folder of the host


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("there is no video at /data/films/a.mp4; give", "there is no video at a.mp4; give"),
        ("got file:/srv/a b/c.mp4", "got a b/c.mp4"),
        ("[Errno 2] gone: '/srv/a.mp4'", "[Errno 2] gone: 'a.mp4'"),
        (r"no C:\Users\me\a.mp4 is", "no a.mp4 is"),
        ("mp4/mov, 25/s, 1 / 2, and/or, https://a.b/c", None),
        ("choose 4n + 1 frames (5/25 s), 480x832", None),
        ("", None),
    ],
)
def test_of_other_paths_the_name_is_left(hide, text, shown):
    assert hide(text) == (text if shown is None else shown)


def test_every_error_has_a_public_name(errors):
    kinds = {
        name: kind
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and issubclass(kind, errors.TurboTalkError)
    }
    assert len(kinds) > 10
    for name, kind in kinds.items():
        assert f"{kind.__module__}.{kind.__qualname__}" == f"turbotalk.errors.{name}"


def test_an_error_of_the_system_is_one_of_ours(part, errors, host):
    @part("nodes.host.checks").hides_folders
    def execute(cls):
        path = host.base / "output" / "a.mkv"
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with pytest.raises(errors.OutputError, match=r"No space left.* output/a\.mkv") as failed:
        execute(None)
    assert str(host.base) not in str(failed.value)


def test_notes_have_no_folder(part, host, monkeypatch):
    messages, texts = part("nodes.host.messages"), []

    class Page:
        def send_progress_text(self, text, node_id):
            texts.append(text)

    monkeypatch.setattr(messages.PromptServer, "instance", Page(), raising=False)
    messages.show_text(f"read {host.base / 'output' / 'a'}\nand /srv/x/b", "7")
    assert texts == ["read output/a\nand b"]


class TestNothing:
    """What hosts pass where there is nothing."""

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"model": None}, "this MODEL has no audio adapter"),
            ({"vae": None}, "got a NoneType as VAE; connect the Wan 2.1 VAE"),
            ({"vae": "a name"}, "got a str as VAE"),
            ({"reference_image": None}, "got no picture as reference image"),
            ({"reference_image": "a.png"}, "got a str as reference image"),
            ({"reference_image": torch.zeros(0, 32, 32, 3)}, "there is no picture"),
            ({"reference_image": torch.zeros(1, 0, 32, 3)}, "there is no picture"),
            ({"speech": None}, "got nothing as speech; connect it. From Encode speech"),
            ({"speech": "hello"}, "got a str as speech"),
            ({"sigmas": torch.zeros(0)}, "got sigmas of shape"),
            ({"sigmas": torch.ones(1)}, "got sigmas of shape"),
            ({"sigmas": torch.ones(1, 3)}, "got sigmas of shape"),
            ({"update": "jump"}, "got update 'jump'; choose one of euler, renoise"),
            ({"steps": 0}, "got steps 0; use 1 to 1000"),
        ],
    )
    def test_the_sampler(self, sample, errors, changes, message):
        with pytest.raises(errors.TurboTalkError, match=message):
            sample(**changes)

    def test_an_empty_prompt_is_no_prompt(self, sample):
        assert torch.equal(sample(positive=[]).read(), sample().read())

    def test_a_single_picture_without_its_batch(self, sample):
        picture = torch.rand(1, 32, 32, 3, generator=torch.Generator().manual_seed(1))
        assert torch.equal(
            sample(reference_image=picture[0]).read(), sample(reference_image=picture).read()
        )

    @pytest.mark.parametrize(
        ("audio", "message"),
        [
            (None, "got no sound; a video without sound has none"),
            ({}, "without samples and their rate"),
            ({"waveform": None, "sample_rate": 16_000}, "without samples and their rate"),
            ({"waveform": torch.zeros(1, 1, 9), "sample_rate": None}, "without samples"),
            ({"waveform": torch.zeros(1, 1, 9), "sample_rate": "fast"}, "without samples"),
            ([], "got a list without samples"),
            ({"waveform": torch.zeros(1, 1, 0), "sample_rate": 16_000}, "no samples"),
            ({"waveform": torch.zeros(1, 0, 9), "sample_rate": 16_000}, "no samples"),
            ({"waveform": torch.zeros(0, 1, 9), "sample_rate": 16_000}, "no samples"),
            ({"waveform": torch.zeros(2, 1, 9), "sample_rate": 16_000}, "batch one by one"),
            ({"waveform": torch.zeros(1, 1, 9), "sample_rate": 0}, "sample rate of 0"),
        ],
    )
    def test_sound(self, run_node, models, errors, audio, message):
        with pytest.raises(errors.AudioError, match=message):
            run_node(
                "TurboTalkEncodeSpeech",
                audio_encoder=models.audio_encoder,
                audio=audio,
                normalize_loudness=True,
            )

    def test_a_connected_voice_without_sound(self, run_node, sample, errors):
        box = dict.fromkeys(("x", "y", "width", "height"), 0)
        speaker = {"name": "Ben", "starts": "together", **box, "audio": None}
        graph = {
            "7": {"class_type": "TurboTalkSpeaker", "inputs": {"audio": ["2", 1]}},
            "2": {"class_type": "GetVideoComponents", "inputs": {}},
        }
        assert run_node("TurboTalkSpeaker", **speaker)[0].waveform is None  # listens
        with pytest.raises(errors.AudioError, match=r"Ben got no sound.*so that Ben listens"):
            run_node("TurboTalkSpeaker", graph=graph, **speaker)
        settings = {"codec": "h264", "crf": 18, "pixel_format": "yuv420p", "audio": None}
        with pytest.raises(errors.AudioError, match="got no sound"):
            run_node(
                "TurboTalkAssembleVideo",
                graph=graph,
                take=sample(max_seconds=0.2),
                start_frame=0,
                num_frames=0,
                **settings,
            )

    def test_models(self, run_node, models, errors):
        for model, patch, message in (
            (None, models.patch, "got a NoneType model"),
            (models.bare, None, "got a model patch of type NoneType"),
        ):
            with pytest.raises(errors.MismatchError, match=message):
                run_node("TurboTalkApplyAudioAdapter", model=model, model_patch=patch, strength=1.0)
        with pytest.raises(errors.RequestError, match="got no text encoder"):
            run_node("TurboTalkPromptSchedule", clip=None, text="a man")
        for node in ("TurboTalkTakeFrames", "TurboTalkSpeakersPreview"):
            name = "take" if node.endswith("Frames") else "speakers"
            with pytest.raises(errors.RequestError, match=f"got nothing as {name}; connect it"):
                run_node(node, **{name: None, "start_frame": 0, "num_frames": 0})

    @pytest.mark.parametrize(
        ("mask", "message"),
        [
            (torch.zeros(0, 8, 8), "got 0 masks"),
            (torch.zeros(3, 8, 8), "got 3 masks"),
            (torch.zeros(2, 1, 8, 8), "got 2 masks"),
            (torch.zeros(8), "got a Tensor as mask"),
        ],
    )
    def test_masks(self, run_node, errors, mask, message):
        box = dict.fromkeys(("x", "y", "width", "height"), 0)
        with pytest.raises(errors.ImageError, match=message):
            run_node("TurboTalkSpeaker", name="Ben", starts="together", **box, mask=mask)

    def test_a_mask_without_white(self, run_node, errors):
        box = dict.fromkeys(("x", "y", "width", "height"), 0)
        speakers = ()
        for name in ("Anna", "Ben"):
            speakers = run_node(
                "TurboTalkSpeaker",
                name=name,
                starts="together",
                **box,
                mask=torch.zeros(1, 32, 32),
                speakers=speakers,
            )
        with pytest.raises(
            errors.ImageError, match="mask of Anna is empty: white marks the region"
        ):
            run_node(
                "TurboTalkSpeakersPreview",
                reference_image=torch.rand(1, 32, 32, 3),
                speakers=speakers,
            )


class TestSeveralPictures:
    @pytest.fixture
    def texts(self, part, monkeypatch):
        texts = []

        class Page:
            def send_progress_text(self, text, node_id):
                texts.append(text)

        server = part("nodes.host.messages").PromptServer
        monkeypatch.setattr(server, "instance", Page(), raising=False)
        return texts

    def test_are_said_to_be_a_film(self, sample, texts, caplog):
        sample(reference_image=torch.rand(4, 32, 32, 3), max_seconds=0.2)
        note = (
            "4 pictures are taken as the frames of a film, 25 a second (0.16 s); for 4 videos "
            "queue 4 times, with one picture each"
        )
        assert texts[0].startswith(f"{note}\n")
        assert note in caplog.text

    def test_one_is_not(self, sample, texts):
        sample(reference_image=torch.rand(1, 32, 32, 3), max_seconds=0.2)
        assert "pictures" not in texts[0]
