"""The four commands, one after the other, on real files and on the synthetic set."""

from __future__ import annotations

import os
import runpy
import sys
from collections import Counter
from inspect import signature
from pathlib import Path

import pytest
import torch

from tests.family import build_vae
from training.data.__main__ import _make_parser, _parse_sizes, main
from training.data.precompute import NEGATIVE_PROMPT, EncoderFiles, run_precompute
from training.data.reader import PreparedSet
from training.data.shards import read_manifest
from turbotalk_core.checkpoints.networks import save_vae
from turbotalk_core.geometry import check_size

from .conftest import MakeVideo


@pytest.mark.parametrize(
    ("text", "count", "example"),
    [
        ("infinitetalk-480", 15, (448, 896)),
        ("infinitetalk-720", 21, (704, 1280)),
        ("832x448", 1, (448, 832)),
    ],
)
def test_sizes_may_be_those_of_infinitetalk(
    text: str, count: int, example: tuple[int, int]
) -> None:
    sizes = _parse_sizes(text)
    assert len(sizes) == count
    assert example in sizes
    for height, width in sizes:
        check_size(height, width)


def test_the_negative_prompt_is_infinitetalks_where_none_is_given() -> None:
    arguments = _make_parser().parse_args(
        ["precompute", "--out", "o", "--vae", "v", "--encoder", "e"]
    )
    assert arguments.negative_prompt == NEGATIVE_PROMPT
    assert signature(run_precompute).parameters["negative_prompt"].default == NEGATIVE_PROMPT
    assert NEGATIVE_PROMPT.startswith("bright tones, overexposed")


@pytest.fixture
def videos(tmp_path: Path, make_video: MakeVideo) -> Path:
    folder = tmp_path / "videos"
    make_video(folder / "one.mp4", [(30, 0.2), (20, 0.8)])
    make_video(folder / "two.mp4", [(24, 0.3)], size=(48, 32))
    (folder / "bad.webm").write_bytes(b"no video")
    return folder


def _models(files: EncoderFiles) -> list[str]:
    return ["--vae", str(files.vae), "--encoder", str(files.audio), "--device", "cpu"]


@pytest.mark.slow
def test_videos_become_a_set_that_can_be_read(
    videos: Path, tmp_path: Path, model_files: EncoderFiles, capsys: pytest.CaptureFixture[str]
) -> None:
    made, prepared = tmp_path / "set", tmp_path / "prepared"
    places = ["--videos", str(videos), "--set", str(made)]
    assert main(["split", *places, "--min-frames", "17"]) == 0
    assert capsys.readouterr().out == (
        "videos: 2 made, 0 were there\n1 skipped:\n  1 x ImageError\n"
    )
    assert main(["filter", *places, "--limit", "side=32,16"]) == 0
    assert capsys.readouterr().out == "pieces: 3 made, 0 were there\ntier 0: 3\n"
    encode = ["precompute", *places, "--out", str(prepared), *_models(model_files)]
    encode += ["--size", "32x16", "16x32", "--frames", "17"]
    for part in ("0", "1"):
        assert main([*encode, "--part", part, "--parts", "2"]) == 0
    records = read_manifest(prepared)
    assert [record["key"] for record in records] == [
        "one.mp4#0-30",
        "one.mp4#30-50",
        "two.mp4#0-24",
    ]
    assert [(record["width"], record["height"]) for record in records] == [(32, 16)] * 2 + [
        (16, 32)
    ]
    capsys.readouterr()
    mp4 = tmp_path / "sample.mp4"
    inspection = ["inspect", str(prepared), "--key", "one.mp4#30-50", "--clip", "later"]
    assert (
        main([*inspection, "--vae", str(model_files.vae), "--mp4", str(mp4), "--device", "cpu"])
        == 0
    )
    assert "17 frames of the later clip" in capsys.readouterr().out
    assert mp4.exists()
    data = PreparedSet(prepared)
    buckets = [(r["height"], r["width"], r["num_voices"]) for r in read_manifest(prepared)]
    assert Counter(buckets) == {(16, 32, 1): 2, (32, 16, 1): 1}
    assert {data.locate(0, step, 1).bucket for step in range(3)} == set(buckets)
    batch = data.batch(0, 0, rank=0, world_size=1, size=1)
    assert batch.latents_BCFHW.shape[:3] == (1, 16, 5)
    assert batch.latents_BCFHW.isfinite().all()


@pytest.mark.slow
def test_files_of_any_name_become_a_set(
    tmp_path: Path,
    make_video: MakeVideo,
    model_files: EncoderFiles,
    capfdbinary: pytest.CaptureFixture[bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every stage, and an output in the folder of such a name, on a console with few letters."""
    monkeypatch.setattr(sys, "stdout", open(1, "w", encoding="cp1252", closefd=False))  # noqa: SIM115
    folder = os.fsdecode(b"\xc4\xe3")
    source = make_video(tmp_path / "one.mp4", [(18, 0.2)])
    names = [b"g\xc4\xe3.mp4", b"a\nb.mp4", b"-a.mp4", b" x .mp4", b"A.mp4", b"a.mp4", 251 * b"n"]
    names += [name.encode() for name in ("😀.mp4", "é.mp4", "e\u0301.mp4", "\u202egpj.mp4")]
    names[6] += b".mp4"
    videos = tmp_path / folder
    videos.mkdir()
    for name in names:
        (videos / os.fsdecode(name)).write_bytes(source.read_bytes())
    (videos / os.fsdecode(b"g\xc4\xe3.txt")).write_text("A square.")
    places = ["--videos", str(videos), "--set", str(videos / "set")]
    prepared = tmp_path / "prepared"
    encode = ["precompute", *places, *_models(model_files), "--size", "16x16", "--frames", "9"]
    assert main(["split", *places, "--min-frames", "17"]) == 0
    assert main(["filter", *places]) == 0
    assert main([*encode, "--out", str(videos / "prepared")]) == 2  # before any work
    assert main([*encode, "--out", str(prepared)]) == 0
    records = read_manifest(prepared)
    assert {record["video"] for record in records} == {os.fsdecode(name) for name in names}
    assert [record["caption"] for record in records].count("A square.") == 1
    batch = PreparedSet(prepared).batch(0, 0, rank=0, world_size=1, size=len(names))
    assert batch.latents_BCFHW.isfinite().all()
    key = os.fsdecode(b"g\xc4\xe3.mp4#0-18")
    mp4 = videos / "sample.mp4"
    look = ["inspect", str(prepared), "--key", key, "--vae", str(model_files.vae)]
    assert main([*look, "--mp4", str(mp4)]) == 0
    assert mp4.exists()
    assert main(["inspect", str(prepared), "--key", "\udcc4"]) == 2
    sys.stdout.flush()
    output, error = capfdbinary.readouterr()
    assert b"shots: 11 made" in output
    assert b'key: "g\\udcc4\\udce3.mp4#0-18"' in output
    assert rb"\udcc4\udce3/sample.mp4: 9 frames" in output
    assert rb"\udcc4\udce3/prepared is not UTF-8" in error
    assert rb"there is no sample '\udcc4'" in error


@pytest.mark.slow
@pytest.mark.usefixtures("_espeak")
def test_avatars_become_a_set(
    tmp_path: Path, model_files: EncoderFiles, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["precompute", "--out", str(tmp_path), *_models(model_files), "--frames", "5", "9"]
    assert main([*command, "--avatars", "2", "--long-every", "2"]) == 0
    assert main([*command, "--avatars", "3", "--long-every", "2"]) == 0
    assert capsys.readouterr().out.endswith("shots: 1 made, 2 were there\n")
    assert [record["num_latents"] for record in read_manifest(tmp_path)] == [3, 2, 3]
    batch = PreparedSet(tmp_path).batch(0, 0, rank=0, world_size=1, size=2)
    assert batch.latents_BCFHW.shape == (2, 16, 2, 16, 16)
    assert main([*command, "--avatars", "3", "--long-every", "0"]) == 2
    assert "other settings: long_every 2, now 0" in capsys.readouterr().err


PRECOMPUTE = "precompute --out p --vae v --encoder e"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("split --videos nowhere --set s", "no mp4, mkv or webm file in nowhere"),
        ("split --videos v --set s --part 3 --parts 2", "part 3 of 2"),
        ("filter --videos v --set nowhere", "run the one before"),
        ("filter --videos v --set s --sync x.pt2", "give --face too"),
        (PRECOMPUTE, "either --videos"),
        (f"{PRECOMPUTE} --videos v", "--videos without --set"),
        (f"{PRECOMPUTE} --videos v --set s --avatars 1", "either --videos"),
        (f"{PRECOMPUTE} --videos v --set s", "run the one before"),
        (f"{PRECOMPUTE} --avatars 1", "v"),
        (f"{PRECOMPUTE} --avatars 1 --frames 193", "up to 189 frames"),
        (f"{PRECOMPUTE} --avatars -1 --pairs 2", "-1 avatars"),
        ("split --videos . --set s --captions nowhere.csv", "no mp4"),
        ("inspect . --vae v --mp4 m.mp4", "cannot read"),
        (f"{PRECOMPUTE} --avatars 1 --frames 80", "80 frames"),
        (f"{PRECOMPUTE} --avatars 1 --tokenizer t", "give --text-encoder too"),
        (f"{PRECOMPUTE} --videos v --set s --size 100x64", "width 100"),
        ("inspect nowhere", "nowhere"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(
    command: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(command.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error


@pytest.mark.parametrize("limit", ["side", "side=1", "height=2,1", "side=a,b"])
def test_a_limit_that_is_none_is_refused(limit: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["filter", "--videos", "v", "--set", "s", "--limit", limit])
    assert "side=256,128" in capsys.readouterr().err


def test_threads_are_as_many_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", counts.append)
    assert main(["inspect", "nowhere", "--threads", "3"]) == 2
    assert counts == [3]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--device cuda:99", "which is not available; available: cpu"),
        ("--device gpu", "which is not available"),
        ("--device meta", "which is not available"),
        ("--threads 100000", "from 1 to"),
        ("--threads 0", "from 1 to"),
    ],
)
def test_a_machine_that_is_not_there_is_refused(
    option: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in (f"{PRECOMPUTE} --avatars 1", "inspect nowhere"):
        with pytest.raises(SystemExit) as ended:
            main([*command.split(), *option.split()])
        assert ended.value.code == 2
        assert message in capsys.readouterr().err.splitlines()[-1]


def test_another_vae_does_not_decode_a_set(
    videos: Path, tmp_path: Path, model_files: EncoderFiles, capsys: pytest.CaptureFixture[str]
) -> None:
    made, prepared = tmp_path / "set", tmp_path / "prepared"
    places = ["--videos", str(videos), "--set", str(made)]
    assert main(["split", *places, "--min-frames", "24", "--max-frames", "24"]) == 0
    assert main(["filter", *places]) == 0
    encode = ["precompute", *places, "--out", str(prepared), *_models(model_files)]
    assert main([*encode, "--size", "16x16", "--frames", "9"]) == 0
    other = tmp_path / "other.safetensors"
    save_vae(other, build_vae(2), {})
    mp4 = tmp_path / "a.mp4"
    assert main(["inspect", str(prepared), "--vae", str(other), "--mp4", str(mp4)]) == 2
    assert "was made with another VAE, vae.safetensors" in capsys.readouterr().err
    assert not mp4.exists()


def test_it_runs_as_a_program(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["training.data", "--help"])
    monkeypatch.delitem(sys.modules, "training.data.__main__")
    with pytest.raises(SystemExit):
        runpy.run_module("training.data", run_name="__main__")
    shown = capsys.readouterr().out
    for name in ("split", "filter", "precompute", "inspect"):
        assert name in shown
