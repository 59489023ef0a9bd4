"""The conformance suite: equal to the reference, file by file.

``python -m pytest tests/golden --golden DIR`` checks every safetensors file in DIR. A file's kind
is the beginning of its name, and ``test_<kind>.py`` checks the kind; what the file is about (sizes,
settings) stands in its metadata. Every ``out…`` tensor of a file must be compared with something.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.golden.figures import OWN_DATA, Golden, find_kind, read_golden

FindWeights = Callable[..., Golden]


def golden_folder(config: pytest.Config) -> Path:
    """Give the folder whose figures are checked."""
    folder = config.getoption("golden")
    assert isinstance(folder, Path)
    return folder


@pytest.fixture
def find_weights(request: pytest.FixtureRequest) -> FindWeights:
    """Find the weights that figures were made with: beside them, or else in the suite's own data.

    Asked for a file name (``dit_weights``) and, where the figures tell it, the configuration. Where
    no file has it, the weights are to be drawn by the recipe.
    """

    def find(name: str, config: dict[str, Any] | None = None) -> Golden:
        kind, _, what = name.partition("_")
        folders = (golden_folder(request.config), OWN_DATA)
        named = [folder / f"{name}.safetensors" for folder in folders]
        others = [p for folder in folders for p in sorted(folder.glob(f"{kind}_*.safetensors"))]
        for path in (*named, *(p for p in others if what in p.stem)):
            if path.is_file():
                weights = read_golden(path)
                if config is None or weights.settings["config"] == config:
                    return weights
        assert config is not None, f"there is no {name}"
        return Golden(path=named[0], tensors={}, settings={"config": config})

    return find


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Iterator[Golden]:
    """Give one file of the kind that a module checks; all that it expects must be compared."""
    opened = read_golden(request.param)
    yield opened
    unread = sorted(n for n in opened.tensors if n.startswith("out") and n not in opened.checked)
    assert not unread, f"{opened.path.name}: nothing was compared with {', '.join(unread)}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run each test of a module on every file of its kind."""
    if "golden" not in metafunc.fixturenames:
        return
    folder = golden_folder(metafunc.config)
    kind = metafunc.definition.path.stem.removeprefix("test_")
    files: list[Any] = [p for p in sorted(folder.glob("*.safetensors")) if find_kind(p) == kind]
    if not files:
        absent = pytest.mark.skip(reason=f"{folder} holds no figures of the kind {kind}")
        files = [pytest.param(None, marks=absent)]
    ids = [getattr(path, "stem", "none") for path in files]
    metafunc.parametrize("golden", files, ids=ids, indirect=True)
