"""The pack in a host that lacks packages, and the lowest versions that the host demands."""

import builtins
import os
import re
import tomllib
from functools import partial
from pathlib import Path

import pytest
import torch

from tools.comfy import in_process

ROOT = Path(__file__).parents[2]


@pytest.fixture
def load_without(host, monkeypatch, tmp_path):
    """Load the pack anew, with a package that none of its modules can import."""
    for name in ("NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"):
        monkeypatch.setattr(host.nodes, name, dict(getattr(host.nodes, name)))

    def load(package):
        base = tmp_path / "without"
        (base / "custom_nodes").mkdir(parents=True)
        ours = str(base)
        usual = builtins.__import__

        def refuse(name, globals=None, locals=None, fromlist=(), level=0):
            importer = str((globals or {}).get("__name__", ""))
            if level == 0 and name.partition(".")[0] == package and importer.startswith(ours):
                raise ModuleNotFoundError(f"No module named {package!r}", name=package)
            return usual(name, globals, locals, fromlist, level)

        monkeypatch.setattr(builtins, "__import__", refuse)
        copy = type(host)(**{**vars(host), "base": base})
        in_process.load_pack(copy)
        return partial(in_process.run_node, copy)

    return load


def _speech(run_node, family, *, normalize_loudness):
    samples = torch.randn(1, 1, 44_100, generator=torch.Generator().manual_seed(3))
    return run_node(
        "TurboTalkEncodeSpeech",
        audio_encoder=run_node(
            "TurboTalkLoadAudioEncoder", audio_encoder_name=family.audio_encoder.name
        ),
        audio={"waveform": samples, "sample_rate": 44_100},
        normalize_loudness=normalize_loudness,
    )


@pytest.mark.parametrize("package", ["torchaudio", "scipy", "sentencepiece", "filelock"])
def test_a_voice_is_encoded_without(load_without, run_node, family, package):
    expected = _speech(run_node, family, normalize_loudness=False)
    heard = _speech(load_without(package), family, normalize_loudness=False)
    assert torch.equal(heard.speeches[0].features.rows(), expected.speeches[0].features.rows())


def test_loudness_needs_pyloudnorm(load_without, family):
    run_node = load_without("pyloudnorm")
    with pytest.raises(RuntimeError, match="pip install pyloudnorm"):
        _speech(run_node, family, normalize_loudness=True)
    assert _speech(run_node, family, normalize_loudness=False)


def test_the_lowest_versions_are_the_hosts():
    def floors(lines):
        found = (re.fullmatch(r"([\w.-]+)>=([\w.]+)", line.strip()) for line in lines)
        return {match[1].lower(): match[2] for match in found if match}

    host = floors((Path(os.environ["COMFYUI_PATH"]) / "requirements.txt").read_text().splitlines())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    ours = floors(project["dependencies"])
    assert ours.pop("torch") == "2.5"  # by the host's README
    assert ours == {name: host[name] for name in ours}
