"""Whatever a widget's value says, no file is opened but those that the host lists."""

import shutil

import pytest
import torch

LOADERS = (
    ("TurboTalkLoadAudioEncoder", "audio_encoder_name", "audio_encoders"),
    ("TurboTalkLoadAudioAdapter", "name", "model_patches"),
)
RIGHT_TO_LEFT = "\u202e"


@pytest.fixture
def outside(host, family):
    """A file of each kind that both loaders would read, beside the folders that the host lists."""
    for name in ("audio_encoder", "adapter"):
        shutil.copy(getattr(family, name), host.base / "models" / "outside.safetensors")
        shutil.copy(getattr(family, name), host.base / f"{name}.safetensors")
    return host.base / "models" / "outside.safetensors"


@pytest.mark.parametrize(("node", "widget", "kind"), LOADERS)
def test_a_name_leads_to_no_other_folder(run_node, errors, outside, node, widget, kind):
    listed = outside.parent / kind
    assert listed.is_dir()
    for name in (
        "../outside.safetensors",
        f"../{kind}/../outside.safetensors",
        "..\\outside.safetensors",
        "../../adapter.safetensors",
        str(outside),
        f"file:{outside}",
        "C:\\outside.safetensors",
        "\uff0e\uff0e\uff0foutside.safetensors",
        f"{RIGHT_TO_LEFT}srotnesnefas.edistuo/..",
        "outside.safetensors\0.safetensors",
        "NUL",
        "CON.safetensors",
        "x" * 5_000,
        "\ud800",
        "",
        ".",
        "..",
        None,
        3,
        ["../outside.safetensors"],
        {"name": "../outside.safetensors"},
    ):
        with pytest.raises(errors.CheckpointError, match="there is no model file"):
            run_node(node, **{widget: name})


@pytest.mark.parametrize(("node", "widget", "kind"), LOADERS)
def test_what_the_host_does_not_list_is_not_opened(
    run_node, errors, host, family, node, widget, kind
):
    """A file inside of the right folder, and not of a kind that the host offers."""
    source = family.adapter if kind == "model_patches" else family.audio_encoder
    place = host.base / "models" / kind / "note.txt"
    shutil.copy(source, place)
    with pytest.raises(errors.CheckpointError, match=r"no model file 'note\.txt' among"):
        run_node(node, **{widget: "note.txt"})


@pytest.mark.parametrize(("node", "widget", "kind"), LOADERS)
def test_a_file_in_a_folder_of_its_own_is_listed_and_loaded(
    run_node, host, family, node, widget, kind
):
    source = family.adapter if kind == "model_patches" else family.audio_encoder
    place = host.base / "models" / kind / "模型" / "a b.safetensors"
    place.parent.mkdir(exist_ok=True)
    shutil.copy(source, place)
    assert run_node(node, **{widget: "模型/a b.safetensors"})


def test_what_is_written_lies_in_the_hosts_temporary_folder(part, host):
    temporary = host.folder_paths.get_temp_directory()
    paths = {part("nodes.host.folders").new_temporary_path(".mp4") for _ in range(3)}
    assert len(paths) == 3
    for path in paths:
        assert str(path.parent) == temporary
        assert path.name.startswith("turbotalk_")
        assert not path.exists()


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_pass_every_bound_of_a_widget_are_refused(
    run_node, errors, models, sample, number
):
    with pytest.raises(errors.RequestError, match="strength"):
        run_node(
            "TurboTalkApplyAudioAdapter",
            model=models.bare,
            model_patch=models.patch,
            strength=number,
        )
    with pytest.raises(errors.RequestError, match="max_seconds"):
        sample(max_seconds=number)
    for name in ("audio_guidance", "text_guidance", "shift", "color_strength"):
        with pytest.raises(errors.RequestError, match=rf"got {name} .*; use a finite number"):
            sample(**{name: number})
    with pytest.raises(errors.RequestError, match="shift"):
        run_node("TurboTalkSchedule", steps=2, shift=number, kind="distilled")
    for name in ("start_seconds", "end_seconds"):
        with pytest.raises(errors.RequestError, match=name):
            run_node(
                "TurboTalkEncodeSpeech",
                audio_encoder=models.audio_encoder,
                audio={"waveform": torch.zeros(1, 1, 640), "sample_rate": 16_000},
                normalize_loudness=True,
                **{name: number},
            )


def test_sound_of_a_rate_that_no_recorder_has_is_refused(run_node, errors, models, host):
    """The host takes the rate from the file as it is, and the filter would need all memory."""
    audio = {"waveform": torch.zeros(1, 1, 640), "sample_rate": 2**31 - 1}
    with pytest.raises(errors.AudioError, match="2147483647 Hz"):
        run_node(
            "TurboTalkEncodeSpeech",
            audio_encoder=models.audio_encoder,
            audio=audio,
            normalize_loudness=True,
        )
    with pytest.raises(errors.AudioError, match="2147483647 Hz"):
        host.audio_encoder_nodes.AudioEncoderEncode.execute(models.audio_encoder, audio)
