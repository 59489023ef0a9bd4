"""What the nodes do with good and bad input, one node at a time."""

import resource

import av
import pytest
import torch

from turbotalk_core.audio.io import read_audio


@pytest.fixture
def left_behind(host):
    """Names of what a run left in the temporary folder."""
    before = set((host.base / "temp").iterdir())
    return lambda: sorted(p.name for p in set((host.base / "temp").iterdir()) - before)


@pytest.fixture
def find_faults(host, part):
    """The reasons against a node's values, by the names of its widgets; ``...`` is a link."""
    checks = part("nodes.host.checks")

    def find(node, **values):
        inputs = {name: checks.LINKED if x is ... else x for name, x in values.items()}
        return checks.find_faults(host.nodes.NODE_CLASS_MAPPINGS[node], inputs)

    return find


class TestSchedule:
    def test_distilled(self, run_node):
        sigmas = run_node("TurboTalkSchedule", steps=2, shift=5.0, kind="distilled")
        assert sigmas.tolist() == pytest.approx([1, 5 / 6, 0])

    def test_reference(self, run_node):
        sigmas = run_node("TurboTalkSchedule", steps=4, shift=7.0, kind="reference")
        assert sigmas.tolist() == pytest.approx([1, 0.9334, 0.7783, 0.0070, 0], abs=1e-4)

    @pytest.mark.parametrize(
        ("steps", "kind", "refusal"),
        [
            (4, "distilled", None),
            (5, "distilled", "1 to 4"),
            (0, "reference", "1 to 1000"),
            (None, "distilled", None),  # linked, so not known yet
            (3, "cosine", "reference, distilled"),
        ],
    )
    def test_validation(self, find_faults, steps, kind, refusal):
        faults = find_faults("TurboTalkSchedule", steps=steps, kind=kind)
        assert len(faults) == (refusal is not None)
        assert all(refusal in reason for reason in faults.values())


class TestEncodeSpeech:
    @pytest.mark.parametrize(("num_samples", "num_frames"), [(16_000, 25), (15_999, 24), (640, 1)])
    def test_the_length_is_rounded_down(self, models, run_node, num_samples, num_frames):
        speech = run_node(
            "TurboTalkEncodeSpeech",
            audio_encoder=models.audio_encoder,
            audio={"waveform": torch.zeros(1, 1, num_samples), "sample_rate": 16_000},
            normalize_loudness=True,
        )
        (voice,) = speech.speeches
        assert voice.features.num_frames == num_frames
        assert voice.features.rows().isfinite().all()

    def test_a_part_of_the_voice_in_sections(self, models, run_node):
        samples = torch.randn(1, 2, 48_000, generator=torch.Generator().manual_seed(5))
        inputs = {
            "audio_encoder": models.audio_encoder,
            "audio": {"waveform": samples, "sample_rate": 16_000},
            "normalize_loudness": True,
        }
        speech = run_node(
            "TurboTalkEncodeSpeech",
            **inputs,
            hearing="sections",
            start_seconds=0.5,
            end_seconds=2.7,
        )
        assert torch.equal(
            torch.cat(list(speech.waveform.blocks()), 1), samples[0, :, 8_000:43_200]
        )
        inputs["audio"]["waveform"] = samples[:, :, 8_000:43_200]
        whole = run_node("TurboTalkEncodeSpeech", **inputs, hearing="whole")
        ours, theirs = (each.speeches[0].features for each in (speech, whole))
        assert ours.num_frames == theirs.num_frames == 55
        # So short, and of whole frames, it is one section.
        torch.testing.assert_close(ours.rows(0, 55), theirs.rows(0, 55), rtol=1e-4, atol=1e-4)
        assert ours.rows().shape == theirs.rows().shape

    def test_nothing_is_left_of_the_voice(self, models, run_node, errors):
        with pytest.raises(errors.AudioError, match="nothing is left of 1 s of sound from 1 s"):
            run_node(
                "TurboTalkEncodeSpeech",
                audio_encoder=models.audio_encoder,
                audio={"waveform": torch.zeros(1, 1, 16_000), "sample_rate": 16_000},
                normalize_loudness=True,
                start_seconds=1.0,
            )

    @pytest.mark.parametrize(
        ("waveform", "message"),
        [
            (torch.full((1, 1, 16_000), torch.nan), "NaN"),
            (torch.zeros(1, 1, 0), "no samples"),
            (torch.zeros(1, 1, 600), "37.5 ms"),
            (torch.zeros(2, 1, 16_000), "batch"),
        ],
    )
    def test_bad_audio(self, models, run_node, errors, waveform, message):
        with pytest.raises(errors.AudioError, match=message):
            run_node(
                "TurboTalkEncodeSpeech",
                audio_encoder=models.audio_encoder,
                audio={"waveform": waveform, "sample_rate": 16_000},
                normalize_loudness=True,
            )


class TestSampler:
    def test_a_take_is_as_long_as_the_voice(self, sample, speech):
        take = sample()
        assert (take.num_frames, take.height, take.width) == (25, 32, 32)
        assert [(chunk.start, chunk.stop) for chunk in take.chunks] == [(0, 21), (21, 25)]
        assert torch.equal(read_audio(take.sound_file).samples_CS, speech.waveform.samples_CS)

    def test_a_voice_that_is_heard_while_it_is_said(self, sample, models, run_node):
        samples = torch.randn(1, 1, 16_000, generator=torch.Generator().manual_seed(3))
        whole, sections = (
            sample(
                speech=run_node(
                    "TurboTalkEncodeSpeech",
                    audio_encoder=models.audio_encoder,
                    audio={"waveform": samples, "sample_rate": 16_000},
                    normalize_loudness=True,
                    hearing=hearing,
                )
            ).read()
            for hearing in ("whole", "sections")
        )
        assert whole.shape == sections.shape
        # So short, and of whole frames, the voice is one section; only the tail sounds otherwise.
        assert (whole[:20].int() - sections[:20].int()).abs().max() <= 1

    def test_the_seed_decides(self, sample):
        first, again, other = (sample(seed=seed).read() for seed in (1, 1, 2))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)

    def test_the_voice_matters_as_much_as_its_strength(self, sample, models, run_node, speech):
        silent = run_node(
            "TurboTalkEncodeSpeech",
            audio_encoder=models.audio_encoder,
            audio={"waveform": torch.zeros(1, 1, 16_000), "sample_rate": 16_000},
            normalize_loudness=True,
        )
        deaf = run_node(
            "TurboTalkApplyAudioAdapter",
            model=models.bare,
            model_patch=models.patch,
            strength=0.0,
        )
        assert not torch.equal(sample(speech=silent).read(), sample(speech=speech).read())
        assert torch.equal(
            sample(speech=silent, model=deaf).read(), sample(speech=speech, model=deaf).read()
        )

    def test_the_size_follows_the_image(self, sample):
        take = sample(size_from="image", reference_image=torch.rand(1, 60, 240, 3))
        assert (take.height, take.width) == (16, 64)  # a quarter as high, 32 x 32 in area

    def test_sigmas_replace_steps_and_shift(self, sample):
        sigmas = torch.tensor([1.0, 0.0])
        one = sample(steps=4, shift=9.0, sigmas=sigmas).read()
        assert torch.equal(one, sample(steps=1, shift=5.0).read())

    def test_a_prompt_and_its_guidance_matter(self, sample):
        words = [[[torch.randn(1, 7, 16), {}]] for _ in range(2)]
        plain = sample().read()
        prompted = sample(positive=words[0]).read()
        pushed = sample(positive=words[0], negative=words[1], text_guidance=3.0).read()
        assert not torch.equal(plain, prompted)
        assert not torch.equal(prompted, pushed)

    def test_a_prompt_may_change_with_time(self, sample, run_node):
        """The second of two chunks begins at frame 21."""
        words = {"a": torch.randn(1, 7, 16), "b": torch.randn(1, 5, 16)}

        class Clip:
            def tokenize(self, text):
                return text

            def encode_from_tokens_scheduled(self, tokens):
                return [[words[tokens], {"pooled_output": None}]]

        schedule = "0-0.84s: a | 0.84s-: b"
        positive = run_node("TurboTalkPromptSchedule", clip=Clip(), text=schedule)
        assert [options["turbotalk_start"] for _, options in positive] == [0, 21]
        assert all("pooled_output" in options for _, options in positive)
        timed, plain = sample(positive=positive).read(), sample(positive=positive[:1]).read()
        assert torch.equal(timed[:21], plain[:21])
        assert not torch.equal(timed[21:], plain[21:])

    def test_a_schedule_that_cannot_be_is_refused_before_running(self, host, pack):
        node = host.nodes.NODE_CLASS_MAPPINGS["TurboTalkPromptSchedule"]
        assert node.validate_inputs(text="a man") is True
        assert node.validate_inputs(text=None) is True
        assert node.validate_inputs() is True
        assert "must begin at 0 s" in node.validate_inputs(text="1-2s: a man")

    def test_colours_are_brought_to_the_picture(self, sample):
        picture = torch.rand(1, 32, 32, 3, generator=torch.Generator().manual_seed(5))
        picture = 0.2 + 0.3 * picture * torch.tensor([1.0, 0.5, 0.0])  # dark, and rather red
        target = picture.mean((0, 1, 2))
        distances = []
        for strength in (0.0, 0.5, 1.0):
            take = sample(reference_image=picture, color_strength=strength).read()
            distances.append((take.float().mean((0, 1, 2)) / 255 - target).abs().sum())
        assert distances[0] > 2 * distances[2]
        assert distances[0] > distances[1] > distances[2]

    def test_apg_changes_guidance_alone(self, sample):
        plain, projected = (sample(apg=apg).read() for apg in (False, True))
        assert torch.equal(plain, projected)
        plain, projected = (sample(apg=apg, audio_guidance=4.0).read() for apg in (False, True))
        assert not torch.equal(plain, projected)

    def test_an_anchor_is_for_later_chunks(self, sample):
        chosen = [sample(anchor=anchor).read() for anchor in ("off", "on", "auto")]
        plain, anchored, automatic = chosen
        assert torch.equal(anchored[:13], plain[:13])
        assert not torch.equal(anchored[13:], plain[13:])
        assert torch.equal(automatic, plain)  # the model's file does not ask for it

    @pytest.mark.parametrize(
        ("seconds", "num_frames"), [(0, 25), (0.01, 1), (0.28, 7), (0.92, 23), (60.0, 25)]
    )
    def test_a_quick_look(self, sample, seconds, num_frames):
        """Its frames are those of the whole, as far as its chunks are."""
        take = sample(max_seconds=seconds)
        assert take.num_frames == num_frames
        whole = sample().read()
        assert torch.equal(take.read()[:21], whole[: min(21, num_frames)])

    @pytest.mark.parametrize(
        ("image", "message"),
        [
            (torch.zeros(1, 8, 32, 3), "32x8"),
            (torch.full((1, 32, 32, 3), torch.nan), "NaN"),
        ],
    )
    def test_bad_pictures(self, sample, errors, left_behind, image, message):
        with pytest.raises(errors.ImageError, match=message):
            sample(reference_image=image)
        assert left_behind() == []

    def test_transparency_and_grey(self, sample):
        white = sample(reference_image=torch.ones(1, 32, 32, 3)).read()
        assert torch.equal(white, sample(reference_image=torch.zeros(1, 32, 32, 4)).read())
        assert torch.equal(white, sample(reference_image=torch.ones(1, 32, 32, 1)).read())

    def test_stopping_between_two_calls_keeps_what_is_finished(
        self, sample, models, host, part, left_behind
    ):
        """The stop button is pressed during the third network call, in the second chunk."""
        adapter, management = part("nodes.host.audio_adapter"), host.model_management
        seen = []

        class Pressing(adapter.AudioAttentionPatch):
            def __call__(self, arguments):
                seen.append(left_behind())
                if len(seen) == 5:  # two blocks a call
                    management.interrupt_current_processing(True)
                return super().__call__(arguments)

        model = models.bare.clone()
        model.set_model_patch(Pressing(models.patch, 1.0), adapter.PATCH_POINT)
        with pytest.raises(management.InterruptProcessingException):
            sample(model=model, steps=2)
        assert len(seen) <= 6  # no other call began
        (name,) = left_behind()
        take = part("turbotalk_core.takes.take").Take.open(host.base / "temp" / name)
        assert [(chunk.start, chunk.stop) for chunk in take.chunks] == [(0, 21)]
        assert not take.is_whole

    def test_a_full_disk_leaves_nothing(self, sample, errors, left_behind):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))
        try:
            with pytest.raises(errors.OutputError, match="File too large"):
                sample()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert left_behind() == []

    @pytest.mark.parametrize(
        ("changes", "refusal"),
        [
            ({}, None),
            ({"steps": 0}, "steps 0; use 1 to 1000"),
            ({"steps": 5}, "5 steps; use 1 to 4"),
            ({"steps": 5, "sigmas": ...}, None),  # connected, so its value is not known yet
            ({"width": ...}, None),
            ({"width": 40}, "width 40; use 16, 32, 48 and so on"),
            ({"chunk_frames": 80}, "chunk_frames 80; use 5, 9, 13 and so on"),
            ({"motion_frames": 8}, "motion_frames 8; use 1, 5, 9 and so on"),
            ({"chunk_frames": 21, "motion_frames": 21}, "21 motion frames in chunks of 21"),
            ({"text_guidance": 5.0}, "without a prompt"),
            ({"text_guidance": 5.0, "positive": ...}, None),
            ({"text_guidance": float("nan")}, "got text_guidance nan; use a finite number"),
        ],
    )
    def test_validation(self, find_faults, changes, refusal):
        settings = {
            "steps": 4,
            "width": 640,
            "height": 640,
            "chunk_frames": 81,
            "motion_frames": 9,
            "text_guidance": 1.0,
        }
        faults = find_faults("TurboTalkSampler", **(settings | changes))
        assert len(faults) == (refusal is not None)
        assert all(refusal in reason for reason in faults.values())


def make_graph(**settings):
    """A workflow whose node "7" is the sampler."""
    return {
        "1": {"class_type": "UNETLoader", "inputs": {"unet_name": "a"}},
        "2": {"class_type": "Patch", "inputs": {"model": ["1", 0], **settings}},
        "7": {"class_type": "TurboTalkSampler", "inputs": {"model": ["2", 0], "seed": 0}},
        "8": {"class_type": "After", "inputs": {"take": ["7", 0], "crf": 3}},
    }


class TestGoingOn:
    @pytest.fixture
    def count_calls(self, models, host, part):
        """A MODEL that counts the calls of its network, and stops before a given one."""
        adapter, management = part("nodes.host.audio_adapter"), host.model_management

        def make(stop_at=None):
            seen = []

            class Counting(adapter.AudioAttentionPatch):
                def __call__(self, arguments):
                    seen.append(None)
                    if stop_at is not None and len(seen) == 2 * stop_at:  # two blocks a call
                        management.interrupt_current_processing(True)
                    return super().__call__(arguments)

            model = models.bare.clone()
            model.set_model_patch(Counting(models.patch, 1.0), adapter.PATCH_POINT)
            return model, lambda: len(seen) // 2

        return make

    def test_the_same_work_goes_on_after_the_last_whole_chunk(
        self, sample, count_calls, host, caplog
    ):
        stopping, _ = count_calls(stop_at=3)
        with pytest.raises(host.model_management.InterruptProcessingException):
            sample(model=stopping, steps=2, graph=make_graph(name="stopped"))
        model, num_calls = count_calls()
        with caplog.at_level("INFO"):
            take = sample(model=model, steps=2, graph=make_graph(name="stopped"))
        assert num_calls() == 2  # of the second chunk
        assert "of which 1 of 2 chunks are finished" in caplog.text
        assert host.base / "output" in take.folder.parents
        model, num_calls = count_calls()
        whole = sample(model=model, steps=2, graph=make_graph(name="not stopped"))
        assert num_calls() == 4
        assert whole.folder != take.folder
        assert torch.equal(whole.read(), take.read())

    def test_a_whole_take_is_not_made_again(self, sample, count_calls):
        graph = make_graph(name="twice")
        first = sample(graph=graph)
        model, num_calls = count_calls()
        assert sample(model=model, graph=graph) == first
        assert num_calls() == 0

    def test_other_work_begins_anew_and_says_why(self, sample, count_calls, host, caplog):
        stopping, _ = count_calls(stop_at=3)
        graph = make_graph(name="other")
        with pytest.raises(host.model_management.InterruptProcessingException):
            sample(model=stopping, steps=2, graph=graph)
        with caplog.at_level("INFO"):
            take = sample(steps=2, seed=9, graph=graph)
        assert "keeps 21 of 25 frames made before, because seed was 0 and is 9" in caplog.text
        assert take.is_whole


class TestGraph:
    @pytest.fixture
    def describe(self, host, part):
        describe = part("nodes.host.takes").describe_graph
        return lambda graph: describe(host.graph.DynamicPrompt(graph), "7")

    def test_only_what_leads_to_the_node_counts(self, describe):
        graph = make_graph(name="a")
        described = describe(graph)
        graph["8"]["inputs"]["crf"] = 40
        assert describe(graph) == described
        del graph["8"]
        assert describe(graph) == described

    def test_numbers_of_nodes_do_not_count(self, describe):
        graph = make_graph(name="a")
        renamed = {key: dict(node) for key, node in graph.items()}
        renamed["31"] = renamed.pop("2")
        renamed["7"] = graph["7"] | {"inputs": {"model": ["31", 0], "seed": 0}}
        assert describe(renamed) == describe(graph)

    @pytest.mark.parametrize(
        "change",
        [
            lambda graph: graph["1"]["inputs"].update(unet_name="b"),
            lambda graph: graph["2"]["inputs"].update(name="b"),
            lambda graph: graph["2"].update(class_type="Other"),
            lambda graph: graph["2"]["inputs"].update(model=["1", 1]),
            lambda graph: graph["7"]["inputs"].update(model=["1", 0]),
        ],
    )
    def test_whatever_leads_to_the_node_counts(self, describe, change):
        described = describe(make_graph(name="a"))
        graph = make_graph(name="a")
        change(graph)
        assert describe(graph) != described

    def test_without_a_graph_nothing_is_known(self, describe, part):
        assert part("nodes.host.takes").describe_graph(None, "7") == ""
        assert describe({}) == ""


def probe(video):
    with av.open(video.get_stream_source()) as container:
        picture = container.streams.video[0]
        seconds = {
            stream.type: float(stream.duration * stream.time_base) for stream in container.streams
        }
        frames = [torch.from_numpy(f.to_ndarray(format="rgb24")) for f in container.decode(picture)]
    return torch.stack(frames), seconds


class TestAssembleVideo:
    SETTINGS = {"codec": "h264", "crf": 1, "pixel_format": "yuv444p"}  # noqa: RUF012

    def test_the_video_is_the_take_with_its_sound(self, sample, run_node):
        take = sample()
        video = run_node(
            "TurboTalkAssembleVideo", take=take, start_frame=0, num_frames=0, **self.SETTINGS
        )
        frames, seconds = probe(video)
        assert seconds == {"video": pytest.approx(1), "audio": pytest.approx(1, abs=0.04)}
        assert frames.shape[0] == 25 == video.get_frame_count()
        assert (frames.float() - take.read().float()).abs().mean() < 3

    def test_a_part_of_it(self, sample, run_node):
        take = sample()
        video = run_node(
            "TurboTalkAssembleVideo", take=take, start_frame=3, num_frames=10, **self.SETTINGS
        )
        frames, seconds = probe(video)
        assert seconds == {"video": pytest.approx(0.4), "audio": pytest.approx(0.4, abs=0.04)}
        assert (frames.float() - take.read(3, 13).float()).abs().mean() < 3

    def test_other_sound(self, sample, run_node):
        audio = {"waveform": torch.zeros(1, 2, 24_000), "sample_rate": 48_000}  # half a second
        video = run_node(
            "TurboTalkAssembleVideo",
            take=sample(),
            start_frame=0,
            num_frames=0,
            audio=audio,
            **self.SETTINGS,
        )
        with av.open(video.get_stream_source()) as container:
            sound = container.streams.audio[0]
            assert (sound.rate, sound.channels) == (48_000, 2)
            assert float(sound.duration * sound.time_base) == pytest.approx(1, abs=0.04)

    def test_stopping_leaves_nothing(self, sample, run_node, host, left_behind):
        take = sample()
        kept = left_behind()
        host.model_management.interrupt_current_processing(True)
        with pytest.raises(host.model_management.InterruptProcessingException):
            run_node(
                "TurboTalkAssembleVideo", take=take, start_frame=0, num_frames=0, **self.SETTINGS
            )
        assert left_behind() == kept

    def test_a_take_that_was_deleted(self, sample, run_node, errors, left_behind):
        take = sample()
        for file in take.folder.iterdir():
            file.unlink()
        with pytest.raises(errors.OutputError, match=r"sound\.mka"):
            run_node(
                "TurboTalkAssembleVideo", take=take, start_frame=0, num_frames=0, **self.SETTINGS
            )
        assert left_behind() == [take.folder.name]


class TestTakeFrames:
    @pytest.mark.parametrize(
        ("start", "count", "stop"), [(0, 0, 25), (4, 3, 7), (20, 81, 25), (24, 1, 25)]
    )
    def test_frames_are_exact(self, sample, run_node, start, count, stop):
        take = sample()
        images = run_node("TurboTalkTakeFrames", take=take, start_frame=start, num_frames=count)
        assert images.dtype == torch.float32
        assert torch.equal(images, take.read(start, stop).float() / 255)

    def test_a_start_after_the_end(self, sample, run_node, errors):
        with pytest.raises(errors.ChunkError, match=r"\[0, 25\)"):
            run_node("TurboTalkTakeFrames", take=sample(), start_frame=25, num_frames=1)
