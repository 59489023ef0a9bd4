"""No figure is passed over in silence."""

from pathlib import Path

import pytest
import torch

from tests.golden.conftest import FindWeights, golden_folder
from tests.golden.figures import KINDS, OWN_DATA, Golden, find_kind
from tests.golden.networks import build_dit


@pytest.fixture
def folder(request: pytest.FixtureRequest) -> Path:
    return golden_folder(request.config)


def test_every_file_is_of_a_kind_that_is_checked(folder: Path) -> None:
    files = sorted(folder.glob("*.safetensors"))
    assert files, f"there are no figures in {folder}"
    assert [path.name for path in files if find_kind(path) is None] == []


def test_every_kind_is_among_our_own() -> None:
    own = {find_kind(path) for path in OWN_DATA.glob("*.safetensors")}
    assert own == set(KINDS)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("dit_two", "dit"), ("rope", "rope"), ("audio_proj_wide", "audio_proj"), ("ropes", None)],
)
def test_the_kind_is_the_beginning_of_the_name(name: str, kind: str | None) -> None:
    assert find_kind(Path(f"{name}.safetensors")) == kind


def test_weights_are_drawn_where_no_file_has_them(find_weights: FindWeights) -> None:
    stored = find_weights("dit_weights")
    drawn = Golden(path=stored.path, tensors={}, settings=stored.settings)
    for ours, theirs in zip(build_dit(drawn), build_dit(stored), strict=True):
        expected = theirs.state_dict()
        for name, tensor in ours.state_dict().items():
            assert torch.equal(tensor, expected[name]), name
