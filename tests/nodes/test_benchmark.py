"""The benchmark's arms make the same video, each in its own way, and are timed."""

import pytest

from tools.benchmark.random_family import write_released_sizes
from tools.benchmark.run import WARM, Scene, compare, main


def test_all_arms_make_the_video(host, pack):
    write_released_sizes(host.base / "models")
    scene = Scene(height=32, width=48, chunk_frames=21, motion_frames=5, num_chunks=2)
    arms = compare(host, pack, scene, rounds=2)
    assert scene.num_frames == 37
    assert list(arms) == ["host_native", "our_nodes", "our_nodes_pytorch", "core", "reference_way"]
    for arm in arms.values():
        assert len(arm["all_seconds"]) == 2
        assert min(arm["all_seconds"]) <= arm["seconds"] <= max(arm["all_seconds"])
        assert arm["frames_per_second"] == 37 / arm["seconds"]
    for name in ("our_nodes", "our_nodes_pytorch", "core"):
        assert set(arms[name]["parts"]) == {"encode", "forward", "decode", "rest", "assemble"}
        assert sum(arms[name]["parts"].values()) == pytest.approx(arms[name]["seconds"], rel=0.5)
    assert arms["core"]["parts"]["assemble"] == 0 < arms["our_nodes"]["parts"]["assemble"]
    videos = sorted(path.name for path in (host.base / "output").glob("*.mp4"))
    assert {"native_0.mp4", "native_2.mp4", "ours_0.mp4", "ours_2.mp4"} <= set(videos)


def test_a_video_too_short_to_watch_its_memory_is_refused_at_once(capsys, tmp_path):
    outputs = ["--json", str(tmp_path / "a.json"), "--markdown", str(tmp_path / "a.md")]
    with pytest.raises(SystemExit):
        main([*outputs, "--chunks", str(WARM + 1)])
    assert f"make at least {WARM + 2}" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())
