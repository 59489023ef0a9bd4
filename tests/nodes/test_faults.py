"""What goes wrong outside of the nodes: memory that runs out, disks, the stop button."""

from contextlib import contextmanager

import pytest
import torch

SHORT = "CUDA out of memory. Tried to allocate 2.00 GiB."


def make_graph(name):
    """A workflow whose node "7" is the sampler; takes of equal ones lie in the same folder."""
    return {
        "2": {"class_type": "Patch", "inputs": {"name": name}},
        "7": {"class_type": "TurboTalkSampler", "inputs": {"model": ["2", 0]}},
    }


@pytest.fixture
def prepared(part, monkeypatch):
    """Whether weights were to be offloaded, for each time that the host was asked to load them."""
    helpers, asked = part("nodes.host.denoiser").comfy.sampler_helpers, []
    prepare = helpers.prepare_sampling

    def watch(*arguments, force_offload=False, **named):
        asked.append(force_offload)
        return prepare(*arguments, force_offload=force_offload, **named)

    monkeypatch.setattr(helpers, "prepare_sampling", watch)
    return asked


@pytest.fixture
def unloaded(host, monkeypatch):
    """Counts how often the host unloaded all models."""
    management, calls = host.model_management, []
    unload = management.unload_all_models
    monkeypatch.setattr(management, "unload_all_models", lambda: (calls.append(1), unload()))
    return calls


@pytest.fixture
def make_short(models, part, prepared):
    """A MODEL on a device that is too small for it, from a network call on."""
    adapter = part("nodes.host.audio_adapter")

    def make(first, *, is_hopeless=False):
        calls = []

        class Short(adapter.AudioAttentionPatch):
            def __call__(self, arguments):
                if arguments["transformer_options"]["block_index"] == 0:
                    calls.append(prepared[-1])
                if len(calls) > first and (is_hopeless or not prepared[-1]):
                    raise torch.OutOfMemoryError(SHORT)
                return super().__call__(arguments)

        model = models.bare.clone()
        model.set_model_patch(Short(models.patch, 1.0), adapter.PATCH_POINT)
        return model, calls

    return make


class TestMemory:
    def test_the_network_is_asked_once_more_with_its_weights_elsewhere(
        self, sample, make_short, unloaded, caplog
    ):
        expected = sample(steps=2).read()
        model, calls = make_short(1)
        assert torch.equal(sample(model=model, steps=2).read(), expected)
        # Two chunks of two calls, the second of which was made twice; and never again.
        assert calls == [False, False, True, True, True]
        assert len(unloaded) == 1
        assert caplog.text.count("memory ran out in the video model") == 1

    def test_a_second_shortage_is_one_to_the_host_and_keeps_what_is_finished(
        self, sample, make_short, host, errors, prepared, caplog
    ):
        expected = sample(steps=2, graph=make_graph("enough")).read()
        model, calls = make_short(2, is_hopeless=True)
        with pytest.raises(errors.OutOfMemoryError) as refused:
            sample(model=model, steps=2, graph=make_graph("short"))
        assert calls == [False, False, False, True]
        assert host.model_management.is_oom(refused.value)  # then it unloads all models
        for told in (SHORT, "32x32 with chunks of 21 frames", "run the same again", "chunk_frames"):
            assert told in str(refused.value)
        prepared.clear()
        with caplog.at_level("INFO"):
            take = sample(steps=2, graph=make_graph("short"))
        assert "of which 1 of 2 chunks are finished" in caplog.text
        assert prepared == [False, False]  # as usual again
        assert torch.equal(take.read(), expected)

    def test_other_errors_are_not_tried_again(self, sample, models, part, unloaded):
        adapter, calls = part("nodes.host.audio_adapter"), []

        class Failing(adapter.AudioAttentionPatch):
            def __call__(self, arguments):
                calls.append(1)
                raise RuntimeError("shapes cannot be multiplied")

        model = models.bare.clone()
        model.set_model_patch(Failing(models.patch, 1.0), adapter.PATCH_POINT)
        with pytest.raises(RuntimeError, match="shapes"):
            sample(model=model)
        assert len(calls) == 1
        assert unloaded == []

    @pytest.mark.parametrize("way", ["encode", "decode"])
    def test_the_vae_is_asked_once_more_by_the_host(self, sample, models, monkeypatch, way):
        """In tiles, of which one covers a picture as small as this."""
        expected = sample().read()
        network, calls = models.vae.first_stage_model, []
        compute = getattr(network, way)

        def run(*arguments, **named):
            calls.append(1)
            if len(calls) == 1:
                raise torch.OutOfMemoryError(SHORT)
            return compute(*arguments, **named)

        monkeypatch.setattr(network, way, run, raising=False)
        frames = sample().read()
        assert len(calls) > 1
        assert (frames.int() - expected.int()).abs().max() <= 1

    def test_a_vae_that_does_not_fit_even_so(self, sample, models, errors, host, monkeypatch):
        def fail(*_arguments, **_named):
            raise torch.OutOfMemoryError(SHORT)

        monkeypatch.setattr(models.vae, "decode", fail)
        with pytest.raises(errors.OutOfMemoryError, match="a smaller size") as refused:
            sample()
        assert host.model_management.is_oom(refused.value)


class TestImages:
    @pytest.fixture
    def shown(self, part, monkeypatch):
        texts = []

        class Page:
            def send_progress_text(self, text, node_id):
                texts.append((node_id, text))

        monkeypatch.setattr(
            part("nodes.host.messages").PromptServer, "instance", Page(), raising=False
        )
        return texts

    def test_what_they_take_is_said(self, sample, run_node, shown, caplog):
        take = sample()
        shown.clear()
        images = run_node("TurboTalkTakeFrames", take=take, start_frame=0, num_frames=0)
        assert images.nbytes == 25 * 32 * 32 * 3 * 4
        text = "25 frames of 32x32 as images take 0.00 GB of memory"
        assert shown == [("7", text)]
        assert text in [record.getMessage() for record in caplog.records]

    def test_more_than_there_is_room_for_is_refused(
        self, sample, run_node, errors, shown, host, monkeypatch
    ):
        take = sample()
        shown.clear()
        frame_bytes = 32 * 32 * 3 * 4
        monkeypatch.setattr(
            host.model_management, "get_free_memory", lambda _device: 8 * frame_bytes
        )
        with pytest.raises(errors.RequestError, match="at most 8 frames at a time") as refused:
            run_node("TurboTalkTakeFrames", take=take, start_frame=0, num_frames=9)
        assert "25" not in str(refused.value)  # those asked for count
        assert shown == []
        read = run_node("TurboTalkTakeFrames", take=take, start_frame=0, num_frames=8)
        assert torch.equal(read, take.read(0, 8).float() / 255)

    def test_frames_are_made_images_batch_by_batch(self, sample, run_node, part, monkeypatch):
        take, batches = sample(), []
        node = part("nodes.take_frames")
        convert = node.image_from_bytes

        def watch(frames_THWC):
            batches.append(len(frames_THWC))
            return convert(frames_THWC)

        monkeypatch.setattr(node, "image_from_bytes", watch)
        run_node("TurboTalkTakeFrames", take=take, start_frame=0, num_frames=0)
        assert sum(batches) == 25
        assert max(batches) <= 16


class TestDisk:
    def test_an_output_folder_that_is_read_only(
        self, sample, make_short, host, part, errors, read_only
    ):
        folder = host.base / "output" / part("nodes.host.takes").FOLDER
        folder.mkdir(exist_ok=True)
        before = set(folder.iterdir())
        model, calls = make_short(99)
        with read_only(folder), pytest.raises(errors.OutputError, match="Permission denied"):
            sample(model=model, graph=make_graph("read-only"))
        assert calls == []
        assert set(folder.iterdir()) == before

    def test_a_temporary_folder_that_is_read_only(self, sample, run_node, host, errors, read_only):
        take = sample()
        before = set((host.base / "temp").iterdir())
        settings = {"codec": "h264", "crf": 18, "pixel_format": "yuv420p"}
        with (
            read_only(host.base / "temp"),
            pytest.raises(errors.OutputError, match="Permission denied"),
        ):
            run_node("TurboTalkAssembleVideo", take=take, start_frame=0, num_frames=0, **settings)
        assert set((host.base / "temp").iterdir()) == before

    @pytest.fixture
    def dying(self, part, monkeypatch):
        """Inside of it an encoder dies in its thread, at the second batch of frames."""
        writer = part("turbotalk_core.video.writer").VideoWriter
        write = writer.write

        @contextmanager
        def run():
            calls = []

            def die(self, frames_THWC):
                calls.append(1)
                if len(calls) == 2:
                    raise MemoryError
                write(self, frames_THWC)

            with monkeypatch.context() as patch:
                patch.setattr(writer, "write", die)
                with pytest.raises(MemoryError):
                    yield

        return run

    def test_an_encoder_of_a_take_that_dies(self, sample, make_short, dying):
        expected = sample(graph=make_graph("lives")).read()
        with dying():
            sample(graph=make_graph("dies"))
        model, calls = make_short(99)
        take = sample(model=model, graph=make_graph("dies"))
        assert len(calls) == 1  # the second chunk's
        assert torch.equal(take.read(), expected)

    def test_an_encoder_of_a_video_that_dies(self, sample, run_node, host, dying):
        settings = {"codec": "h264", "crf": 18, "pixel_format": "yuv420p"}
        settings |= {"take": sample(), "start_frame": 0, "num_frames": 0}
        before = set((host.base / "temp").iterdir())
        with dying():
            run_node("TurboTalkAssembleVideo", **settings)
        assert set((host.base / "temp").iterdir()) == before
        assert run_node("TurboTalkAssembleVideo", **settings).get_frame_count() == 25


class TestStopping:
    def test_in_the_middle_of_decoding_it_keeps_what_is_finished(
        self, sample, models, host, monkeypatch, caplog
    ):
        management = host.model_management
        decode, calls = models.vae.decode, []

        def press(*arguments, **named):
            calls.append(1)
            if len(calls) == 4:  # two chunks were made before, which nobody stops
                management.interrupt_current_processing(True)
            return decode(*arguments, **named)

        monkeypatch.setattr(models.vae, "decode", press)
        expected = sample(graph=make_graph("not stopped")).read()
        with pytest.raises(management.InterruptProcessingException):
            sample(graph=make_graph("stopped"))
        with caplog.at_level("INFO"):
            take = sample(graph=make_graph("stopped"))
        assert "of which 1 of 2 chunks are finished" in caplog.text
        assert torch.equal(take.read(), expected)
