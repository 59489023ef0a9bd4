"""A video to dub instead of a portrait: each chunk is shown what the video shows at its start."""

import importlib
import io
from fractions import Fraction
from pathlib import Path

import av
import pytest
import torch

SIDE = 32
SECOND_CHUNK = 21 - 5  # where it starts: chunk_frames less motion_frames of the fixture


def write_video(target, num_frames, rate):
    """Write frames that all differ, and give them as a player shows them."""
    generator = torch.Generator().manual_seed(0)
    with av.open(target, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "10"})
        stream.width = stream.height = SIDE
        stream.pix_fmt = "yuv420p"
        for index in range(num_frames):
            picture = torch.full((SIDE, SIDE, 3), 4 * index, dtype=torch.uint8)
            picture[8:24, 8:24] = torch.randint(0, 255, (3,), generator=generator).byte()
            frame = av.VideoFrame.from_ndarray(picture.numpy(), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    if isinstance(target, io.BytesIO):
        target.seek(0)
    with av.open(target) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == num_frames
    return torch.stack([torch.from_numpy(frame) for frame in frames]).float() / 255


@pytest.fixture
def open_video(host):
    """The host's VIDEO of a file."""
    return importlib.import_module("comfy_api.latest").InputImpl.VideoFromFile


def test_a_video_is_its_frames(sample, open_video, tmp_path):
    frames = write_video(str(tmp_path / "talk.mp4"), 25, 25)
    dubbed = sample(reference_image=open_video(str(tmp_path / "talk.mp4"))).read()
    assert torch.equal(dubbed, sample(reference_image=frames).read())
    still = sample(reference_image=frames[:1]).read()
    assert torch.equal(dubbed[:21], still[:21])
    assert not torch.equal(dubbed[21:], still[21:])


def test_each_chunk_is_shown_the_frame_at_its_start(sample):
    frames = torch.rand(25, SIDE, SIDE, 3, generator=torch.Generator().manual_seed(1))
    dubbed = sample(reference_image=frames).read()
    for changed, changes in ((SECOND_CHUNK, True), (SECOND_CHUNK - 1, False), (24, False)):
        other = frames.clone()
        other[changed] = 0
        assert torch.equal(sample(reference_image=other).read(), dubbed) is not changes


def test_a_video_that_ends_early_stays_at_its_last_frame(sample):
    frames = torch.rand(25, SIDE, SIDE, 3, generator=torch.Generator().manual_seed(1))
    assert torch.equal(
        sample(reference_image=frames[:10]).read(),
        sample(
            reference_image=torch.cat((frames[:10], frames[9:10].expand(15, -1, -1, -1)))
        ).read(),
    )


@pytest.mark.parametrize(
    ("rate", "shown"),
    [(50, SECOND_CHUNK * 2), (Fraction(30_000, 1001), 19), (10, 6)],
)
def test_another_frame_rate_keeps_time(sample, open_video, rate, shown):
    """At 16 / 25 s, the start of the second chunk."""
    content = io.BytesIO()
    frames = write_video(content, 60, rate)
    dubbed = sample(reference_image=open_video(content)).read()
    wanted = frames[:1].repeat(25, 1, 1, 1)
    wanted[SECOND_CHUNK] = frames[shown]
    assert torch.equal(dubbed, sample(reference_image=wanted).read())


@pytest.mark.parametrize("seconds", [0, 0.4])
def test_a_trimmed_video(sample, open_video, tmp_path, seconds):
    frames = write_video(str(tmp_path / "talk.mp4"), 40, 25)
    video = open_video(str(tmp_path / "talk.mp4")).as_trimmed(0.2, seconds)
    kept = frames[5:15] if seconds else frames[5:]
    assert torch.equal(sample(reference_image=video).read(), sample(reference_image=kept).read())


def test_a_video_in_memory(host, sample, models):
    """As Create Video makes it."""
    types = importlib.import_module("comfy_api.latest")
    frames = torch.rand(25, SIDE, SIDE, 3, generator=torch.Generator().manual_seed(1))
    video = types.InputImpl.VideoFromComponents(
        types.Types.VideoComponents(images=frames, frame_rate=Fraction(25))
    )
    dubbed, still = (sample(reference_image=x).read() for x in (video, frames[:1]))
    assert dubbed.shape == still.shape
    assert not torch.equal(dubbed, still)


def test_the_size_follows_the_video(sample, open_video):
    content = io.BytesIO()
    write_video(content, 3, 25)
    take = sample(reference_image=open_video(content), size_from="image", width=64, height=16)
    assert (take.height, take.width) == (SIDE, SIDE)


def test_the_preview_shows_the_first_frame(run_node, open_video, host, part):
    content = io.BytesIO()
    frames = write_video(content, 3, 25)
    speakers = tuple(part("turbotalk_core.types").Speaker(name=name) for name in "AB")
    shown, wanted = (
        run_node("TurboTalkSpeakersPreview", reference_image=picture, speakers=speakers)
        for picture in (open_video(content), frames[:1])
    )
    assert torch.equal(shown, wanted)


@pytest.mark.parametrize(
    ("start", "message"), [(0.0, "cannot read a video"), (2.0, "trimmed to begin at 2 s")]
)
def test_bad_videos(sample, open_video, errors, tmp_path, host, start, message):
    path = tmp_path / "talk.mp4"
    write_video(str(path), 25, 25)
    if not start:
        path.write_bytes(path.read_bytes()[:200])
    before = set((host.base / "temp").iterdir())
    with pytest.raises(errors.ImageError, match=message):
        sample(reference_image=open_video(str(path), start_time=start))
    assert set((host.base / "temp").iterdir()) == before


@pytest.mark.parametrize(("num_pictures", "num_shown"), [(1, 1), (25, 2)])
def test_the_bar_counts_each_picture_that_is_shown(
    sample, part, monkeypatch, num_pictures, num_shown
):
    bars = []

    class Bar:
        def __init__(self, total):
            self.total, self.done = total, 0
            bars.append(self)

        def advance(self, units=1, preview_HWC=None):
            self.done += units

    monkeypatch.setattr(part("nodes.sampler"), "HostProgress", Bar)
    sample(reference_image=torch.rand(num_pictures, SIDE, SIDE, 3))
    (bar,) = bars
    assert bar.done == bar.total == num_shown + 2 * 3  # two chunks: encode, one step, decode


class TestPendingEdits:
    """Hosts since 0.35 crop and resize a VIDEO when it is saved; until then its source is whole."""

    @pytest.fixture
    def edit(self, open_video, tmp_path):
        """A VIDEO of 40 frames, of which a newer host shall keep the right lower part."""
        frames = write_video(str(tmp_path / "film.mp4"), 40, 25)

        class Older(type(open_video(""))):
            """As in 0.30."""

        class Newer(Older):
            saved: list[dict[str, object]] = []  # noqa: RUF012
            has_edits = True

            def has_pending_frame_edits(self):
                return self.has_edits

            def save_to(
                self, path, format="auto", codec="auto", metadata=None, bit_depth=None, crf=None,
                color_space=None, preset=None,
            ):  # fmt: skip
                self.saved.append({"path": path, "crf": crf, "preset": preset})
                start, seconds = self.get_active_trim_window()
                kept = frames[round(start * 25) :][: round(seconds * 25) or None, 16:, 16:]
                with av.open(path, "w", format="mp4") as container:
                    stream = container.add_stream("libx264rgb", rate=25, options={"crf": "0"})
                    stream.width = stream.height = 16
                    stream.pix_fmt = "rgb24"
                    for picture in (kept * 255).round().byte().numpy():
                        frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                        container.mux(stream.encode(frame))
                    container.mux(stream.encode(None))

        Newer.saved = []
        return Older, Newer, frames, str(tmp_path / "film.mp4")

    @pytest.fixture
    def left_behind(self, host):
        before = set((host.base / "temp").iterdir())

        def find():
            # besides takes without a graph, which are folders, and previews
            return {x.name for x in set((host.base / "temp").glob("*.mp4")) - before}

        return find

    @pytest.mark.parametrize("window", [(0.0, 0.0), (0.2, 0.0), (0.2, 0.4)])
    def test_are_made_by_the_host(self, sample, edit, left_behind, window):
        _, newer, frames, path = edit
        start, seconds = window
        dubbed = sample(reference_image=newer(path, start_time=start, duration=seconds)).read()
        kept = frames[round(start * 25) :][: round(seconds * 25) or None, 16:, 16:]
        assert torch.equal(dubbed, sample(reference_image=kept).read())
        (saved,) = newer.saved
        assert (saved["crf"], saved["preset"]) == (0, "ultrafast")
        assert left_behind() == set()

    def test_none_pending(self, sample, edit):
        older, newer, _, path = edit
        newer.has_edits = False
        assert torch.equal(
            sample(reference_image=newer(path)).read(), sample(reference_image=older(path)).read()
        )
        assert newer.saved == []

    def test_of_a_host_whose_save_to_takes_less(self, sample, edit, left_behind):
        _, newer, frames, path = edit
        save = newer.save_to

        class Between(newer):
            def save_to(self, path, format="auto", codec="auto", metadata=None):
                save(self, path)

        dubbed = sample(reference_image=Between(path)).read()
        assert torch.equal(dubbed, sample(reference_image=frames[:, 16:, 16:]).read())
        assert left_behind() == set()

    def test_in_the_preview(self, run_node, edit, part, left_behind):
        _, newer, frames, path = edit
        speakers = tuple(part("turbotalk_core.types").Speaker(name=name) for name in "AB")
        shown, wanted = (
            run_node("TurboTalkSpeakersPreview", reference_image=picture, speakers=speakers)
            for picture in (newer(path), frames[:1, 16:, 16:])
        )
        assert torch.equal(shown, wanted)
        assert left_behind() == set()

    def test_the_same_edits_are_the_same_work(self, edit, part):
        _, newer, _, path = edit
        convert, digests = part("nodes.host.convert"), []
        for _ in range(2):
            with convert.open_pictures(newer(path)) as pictures:
                digests.append(pictures.digest())
        assert digests[0] == digests[1]

    @pytest.mark.parametrize("way", ["fails", "fails in the middle", "saves nothing", "damaged"])
    def test_that_fail(self, sample, edit, errors, left_behind, host, way):
        _, newer, _, path = edit

        class Failing(newer):
            def save_to(self, path, **_options):
                if way != "saves nothing" and way != "fails":
                    Path(path).write_bytes(bytes(100))
                if way.startswith("fails"):
                    raise ValueError(f"even dimensions are needed, in {path}")

        with pytest.raises(errors.ImageError, match=r"ComfyUI cannot|cannot read") as failed:
            sample(reference_image=Failing(path))
        assert str(host.base) not in str(failed.value)
        assert left_behind() == set()

    def test_stopped(self, sample, edit, left_behind, host):
        _, newer, _, path = edit
        save = newer.save_to
        interrupted = host.model_management.InterruptProcessingException

        class Stopped(newer):
            def save_to(self, path, crf=None):
                save(self, path)
                raise interrupted

        with pytest.raises(interrupted):
            sample(reference_image=Stopped(path))
        assert left_behind() == set()

    def test_a_missing_file(self, sample, edit, errors, host):
        older, _, _, _ = edit
        with pytest.raises(errors.ImageError, match=r"gone\.mp4") as failed:
            sample(reference_image=older(str(host.base / "input" / "gone.mp4")))
        assert str(host.base) not in str(failed.value)
