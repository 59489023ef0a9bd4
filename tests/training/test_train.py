"""The command: runs that end, go on, refuse, and write what they made."""

from __future__ import annotations

import json
import multiprocessing
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch.multiprocessing.spawn import start_processes

from tests.training.data.sets import make_sample, write_set
from tests.training.tiny_networks import AUDIO_CONFIG, VIDEO_CONFIG, make_networks
from tests.training.tiny_run import TinyBatches, make_recipe
from training import train
from training.data.footage import open_video
from training.engine.checkpoint import read_weights
from training.engine.log import read_log
from training.recipe import DataSource, load_recipe, store_recipe
from training.train import main
from turbotalk_core.checkpoints.inspect import inspect
from turbotalk_core.checkpoints.networks import load_dit, save_vae
from turbotalk_core.loading import read_request

SIZES = {"video": asdict(VIDEO_CONFIG), "audio": asdict(AUDIO_CONFIG)}
ROOT = Path(__file__).parents[2]
CLIP = {"num_frames": 13, "height": 32, "width": 48, "num_text_tokens": 5, "num_image_tokens": 0}


@pytest.fixture(autouse=True)
def _data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "open_data", lambda recipe: [TinyBatches()] * len(recipe.phases))


@pytest.fixture
def recipe_path(tmp_path: Path) -> Path:
    """A recipe of one adversarial phase that begins with weights at random."""
    phase = {
        "method": "adversarial",
        "steps": 2,
        "settings": {**make_recipe().phases["one"].settings, "shift": 7.0},
        "exports": "student",
        "ships_with": {"color_strength": 0.5},
    }
    recipe = make_recipe(
        weights={"student": SIZES}, clip=CLIP, phases={"one": phase}, seed=3, rate={}
    )
    path = tmp_path / "small.yaml"
    store_recipe(recipe, path)
    return path


def _run(path: Path, *more: str) -> int:
    return main([str(path), *more, "--run", str(path.parent / "run")])


@pytest.mark.slow
def test_it_trains_and_writes_model_files(recipe_path: Path) -> None:
    run = recipe_path.parent / "run"
    assert _run(recipe_path) == 0
    assert [line["step"] for line in read_log(run)] == [1, 2]
    assert load_recipe(str(run / "recipe.yaml")) == load_recipe(str(recipe_path))
    models = run / "exports" / "one"
    dit = models / "diffusion_models" / "student.safetensors"
    model, projection = load_dit(dit, models / "model_patches" / "student_adapter.safetensors")
    assert projection is not None
    ends = read_weights(run / "phases" / "one" / "student.safetensors")
    for prefix, module in (("dit.", model), ("projection.", projection)):
        for name, weight in module.state_dict().items():
            assert torch.equal(weight, ends[prefix + name].half().float())
    request = read_request(dit)
    assert (request.num_inference_steps, request.schedule, request.update) == (
        1,
        "distilled",
        "renoise",
    )
    assert (request.shift, request.audio_guidance_scale) == (7.0, 1.0)
    assert (request.height, request.width, request.chunk_frames) == (32, 48, 13)
    settings = inspect(dit).settings
    assert (settings["kind"], settings["color_strength"]) == ("student", 0.5)

    # What has ended is not begun again; more steps go on.
    before = dit.stat().st_mtime_ns
    assert _run(recipe_path, "phases.one.steps=3") == 0
    assert [line["step"] for line in read_log(run)] == [1, 2, 3]
    assert dit.stat().st_mtime_ns > before


@pytest.mark.slow
def test_another_recipe_in_the_same_folder_is_refused(
    recipe_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(recipe_path) == 0
    stored = (recipe_path.parent / "run" / "recipe.yaml").read_text()
    assert _run(recipe_path, "seed=4") == train.REFUSED
    assert "belongs to a run of another recipe" in capsys.readouterr().err
    assert (recipe_path.parent / "run" / "recipe.yaml").read_text() == stored


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("phases.one.settings.student.trains=lora", "got student, trained lora"),
        ("phases.one.exports=null", "got None, trained None"),
    ],
)
def test_only_what_is_exported_and_trained_in_full_is_extrapolated(
    recipe_path: Path, capsys: pytest.CaptureFixture[str], change: str, expected: str
) -> None:
    assert _run(recipe_path, change, "phases.one.extrapolation=1.5") == train.REFUSED
    error = capsys.readouterr().err
    assert "phase one extrapolates by 1.5" in error
    assert expected in error


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("phases.one.settings.num_step=2", "the nearest key is num_steps"),
        ("phases.one.settings.student.learning_rat=2", "nearest key is student.learning_rate"),
        ("phases.one.method=gan", "got the method gan; there are flow_matching, dmd, adversarial"),
        ("phases.one.exports=discriminator", "it must be a role that it trains"),
        ("phases.one.extrapolation=0.5", "greater than or equal to 1"),
        ("weights.student=null", "neither a role of the phase before nor named"),
        ("weights.student.video.dim=25", "the width must be a multiple of the heads"),
        ("weights.student.video.dims=24", "the nearest key is dim"),
        ("phases.one=null", "without phases"),
        ("weights.student.dit=nothing.safetensors", "nothing.safetensors"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    recipe_path: Path, capsys: pytest.CaptureFixture[str], change: str, message: str
) -> None:
    assert _run(recipe_path, "phases.one.steps=0", change) == train.REFUSED
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error


@pytest.mark.slow
def test_files_of_other_sizes_are_refused(
    recipe_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(recipe_path) == 0
    models = recipe_path.parent / "run" / "exports" / "one"
    files = [
        f"weights.student.dit={models}/diffusion_models/student.safetensors",
        f"weights.student.adapter={models}/model_patches/student_adapter.safetensors",
    ]
    other = ["--run", str(recipe_path.parent / "other")]
    change = "weights.student.video.frequency_dim=32"
    assert main([str(recipe_path), *files, change, *other]) == train.REFUSED
    assert "student.safetensors holds WanConfig" in capsys.readouterr().err
    assert main([str(recipe_path), *files, *other]) == 0


@pytest.mark.weights
def test_the_embedded_files_are_what_their_recipe_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    recipe = load_recipe("tiny")
    model = train.network_kind(recipe).load(recipe.weights["teacher"])
    assert sum(weight.numel() for weight in model.parameters()) > 4_000_000


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dit", "adapter", "is_refused"),
    [
        ("wan2.1_i2v_720p_14B_bf16.safetensors", "infinitetalk_single.safetensors", True),
        ("Wan2.1-I2V-14B-720P", "InfiniteTalk/single/infinitetalk.safetensors", True),
        ("Wan2.1-I2V-14B-720P/model.safetensors", "infinitetalk.safetensors", True),
        ("Wan2_1-I2V-14B-720p_fp8_e4m3fn_scaled_KJ.safetensors", "multitalk.safetensors", True),
        ("wan2.1_i2v_480p_14B_bf16.safetensors", "infinitetalk_single.safetensors", False),
        ("my_720p_videos/Wan2.1-I2V-14B-480P", "infinitetalk.safetensors", False),
        ("wan2.1_i2v_720p_14B_bf16.safetensors", "my_own_adapter.safetensors", False),
    ],
)
def test_an_adapter_on_a_base_it_was_not_trained_with_is_refused(
    recipe_path: Path,
    capsys: pytest.CaptureFixture[str],
    dit: str,
    adapter: str,
    is_refused: bool,
) -> None:
    files = [f"weights.student.dit={dit}", f"weights.student.adapter={adapter}"]
    code = _run(recipe_path, *files, "--dry-run")
    assert code == (train.REFUSED if is_refused else 0)
    assert ("Wan2.1-I2V-14B-480P" in capsys.readouterr().err) == is_refused


@pytest.mark.slow
def test_a_warm_up_as_long_as_its_phase_is_refused(
    recipe_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change = "phases.one.settings.discriminator_warmup=2"
    assert _run(recipe_path, change) == train.REFUSED
    error = capsys.readouterr().err
    assert "phase one has 2 steps, and student is first updated after 2" in error
    assert _run(recipe_path, change, "phases.one.steps=3", "--dry-run") == 0


class NullText(TinyBatches):
    """Samples without captions, and an empty negative prompt."""

    text_is_null = True


def test_text_guidance_without_a_text_is_refused(
    recipe_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train, "open_data", lambda recipe: [NullText()] * len(recipe.phases))
    dmd = ["phases.one.method=dmd", "phases.one.settings=null", "weights.teacher={preset: tiny}"]
    sizes = [f"weights.teacher.{part}={json.dumps(SIZES[part])}" for part in SIZES]
    assert _run(recipe_path, *dmd, *sizes) == train.REFUSED
    error = capsys.readouterr().err
    assert "guidance_scale 5" in error
    assert "equals the null text" in error
    assert not (recipe_path.parent / "run").exists()
    off = "phases.one.settings={guidance_scale: 1.0}"
    assert _run(recipe_path, *dmd, *sizes, off, "phases.one.steps=1") == 0


@pytest.mark.slow
def test_a_teacher_is_checked_before_days_are_spent(
    recipe_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.undo()
    samples = {f"s{n}": make_sample(n, rows=4, columns=6) for n in range(2)}
    prepared = write_set(tmp_path / "prepared", samples)
    vae = tmp_path / "vae.safetensors"
    save_vae(vae, make_networks()[2], {})
    mp4 = tmp_path / "check.mp4"
    sizes = [f"weights.teacher.{part}={json.dumps(SIZES[part])}" for part in SIZES]
    changes = [*sizes, f"data.folder={prepared}", "phases.one.method=dmd"]
    changes += ["phases.one.settings=null", "--steps", "2", "--check-teacher", str(mp4)]
    assert _run(recipe_path, *changes) == train.REFUSED
    assert "--check-teacher needs a file that ends in .mp4, --vae" in capsys.readouterr().err
    assert _run(recipe_path, *changes, "--vae", str(vae)) == 0
    printed = capsys.readouterr().out
    assert "17 frames of s" in printed
    assert "by the teacher in 2 steps; it moves" in printed
    assert len(open_video(mp4)) == 17
    assert not (recipe_path.parent / "run").exists()


@pytest.mark.slow
def test_settings_may_be_changed_behind_options(
    recipe_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(recipe_path, "--dry-run", "phases.one.steps=7") == 0
    assert "phase one: adversarial, steps 0 to 7" in capsys.readouterr().out


def test_a_dry_run_writes_nothing(recipe_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(recipe_path, "--dry-run") == 0
    text = capsys.readouterr().out
    assert "phase one: adversarial, steps 0 to 2, 4 samples" in text
    assert "discriminator:" in text
    assert "time at 400 TFLOP/s per GPU" in text
    assert "penalty_every: 4 would save" in text
    assert not (recipe_path.parent / "run").exists()


def test_without_data_it_is_said(recipe_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    with pytest.raises(train.RecipeError, match="names no data"):
        train.open_data(load_recipe(str(recipe_path)))


def _hold_until_killed(folder: Path, ready: Path) -> None:
    with train.hold_run(folder, torch.device("cpu")):
        ready.touch()
        time.sleep(600)


@pytest.mark.slow
def test_a_second_trainer_is_refused_and_the_first_is_untouched(
    recipe_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, ready = recipe_path.parent / "run", recipe_path.parent / "ready"
    assert _run(recipe_path) == 0
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    first = multiprocessing.get_context("forkserver").Process(
        target=_hold_until_killed, args=(run, ready)
    )
    first.start()
    try:
        while not ready.exists():
            assert first.is_alive()
            time.sleep(0.01)
        assert _run(recipe_path, "phases.one.steps=3") == train.REFUSED
        error = capsys.readouterr().err
        assert f"another process trains the run {run}" in error
        assert error.count("\n") == 1
        assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
        other = ["--run", str(recipe_path.parent / "other")]
        assert main([str(recipe_path), "phases.one.steps=0", *other]) == 0
    finally:
        first.kill()
        first.join()
    assert _run(recipe_path, "phases.one.steps=3") == 0
    assert [line["step"] for line in read_log(run)] == [1, 2, 3]


def _join_and_hold(rank: int, folder: Path) -> None:
    torch.distributed.init_process_group(
        "gloo", f"file://{folder / 'store'}", rank=rank, world_size=2
    )
    device = torch.device("cpu")
    for name in ("free", "held"):
        try:
            with train.hold_run(folder / name, device):
                (folder / f"{name}{rank}").write_text("entered")
        except train.OutputError as error:
            (folder / f"{name}{rank}").write_text(str(error))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_all_ranks_enter_a_run_or_none(tmp_path: Path) -> None:
    with train.hold_run(tmp_path / "held", torch.device("cpu")):
        start_processes(_join_and_hold, (tmp_path,), nprocs=2, start_method="forkserver")
    texts = {path.name: path.read_text() for path in tmp_path.glob("*[01]")}
    assert (texts["free0"], texts["free1"]) == ("entered", "entered")
    assert "another process trains the run" in texts["held0"]
    assert "rank 0 cannot hold" in texts["held1"]


@pytest.mark.slow
def test_a_full_disk_ends_in_a_line_and_the_run_goes_on(
    recipe_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = ("phases.one.steps=3", "checkpoints.every=1")
    with monkeypatch.context() as patched:
        save = torch.save

        def fill(state: object, path: Path) -> None:
            save(state, "/dev/full" if "00000002" in path.parts else path)

        patched.setattr(torch, "save", fill)
        assert _run(recipe_path, *changes) == train.REFUSED
    error = capsys.readouterr().err
    assert "the disk is full" in error
    assert error.count("\n") == 1
    run = recipe_path.parent / "run"
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["00000001"]
    assert _run(recipe_path, *changes) == 0
    assert [line["step"] for line in read_log(run)] == [1, 2, 3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("phases.one.steps=.nan", "finite"),
        ("phases.one.steps=100000000000000000000", "finite number of at most"),
        ("phases.one.settings.student.learning_rate=1e999", "learning_rate is inf"),
        ("engine.clip_norm=.inf", "clip_norm is inf"),
        ("seed=99999999999999999999999999", "finite number of at most"),
        ("average.decay=2", "less than or equal to 1"),
        ("phases.one.extrapolation=.inf", "extrapolation is inf"),
    ],
)
def test_numbers_beyond_all_sense_are_refused(
    recipe_path: Path, capsys: pytest.CaptureFixture[str], change: str, message: str
) -> None:
    assert _run(recipe_path, change, "--dry-run") == train.REFUSED
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_frame": 5}, "the nearest key is num_frames"),
        ({"worst_tier": "x"}, "worst_tier is 'x'"),
        ({"num_voices": -1}, "num_voices is -1"),
    ],
)
def test_options_of_the_set_are_checked(
    recipe_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, object], message: str
) -> None:
    monkeypatch.undo()
    recipe = load_recipe(str(recipe_path))
    source = DataSource(folder=recipe_path.parent, options=options)
    with pytest.raises(train.RecipeError, match=message):
        train.open_data(replace(recipe, data=source))


@pytest.mark.parametrize("place", ["file", "folder\udcc4"])
def test_a_folder_that_cannot_be_is_refused(
    recipe_path: Path, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    (recipe_path.parent / "file").write_text("of the user")
    run = ["--run", str(recipe_path.parent / place)]
    assert main([str(recipe_path), *run]) == train.REFUSED
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
