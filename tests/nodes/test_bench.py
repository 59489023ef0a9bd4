"""The benchmark's arms make the same video, each in its own way, and are timed."""

from tests.nodes.family import write_released_sizes
from tools.bench import Scene, compare


def test_all_arms_make_the_video(host, pack):
    write_released_sizes(host.base / "models")
    scene = Scene(height=32, width=48, chunk_frames=21, motion_frames=5, num_chunks=2)
    arms = compare(host, pack, scene, rounds=2)
    assert scene.num_frames == 37
    assert list(arms) == ["host_native", "our_nodes", "core", "reference_way"]
    for arm in arms.values():
        assert len(arm["all_seconds"]) == 2
        assert min(arm["all_seconds"]) <= arm["seconds"] <= max(arm["all_seconds"])
        assert arm["frames_per_second"] == 37 / arm["seconds"]
    videos = sorted(path.name for path in (host.base / "output").glob("*.mp4"))
    assert {"native_0.mp4", "native_2.mp4", "ours_0.mp4", "ours_2.mp4"} <= set(videos)
