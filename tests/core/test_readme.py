"""The Python of the README does what it says, and the names that it uses are all there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import turbotalk_core
from turbotalk_core.takes.take import Take

ROOT = Path(__file__).parents[2]


def _example() -> str:
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    return block


@pytest.mark.slow
@pytest.mark.weights
def test_the_example_makes_a_video(tmp_path: Path) -> None:
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{_example()}"
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True)
    assert (tmp_path / "talk.mp4").stat().st_size > 1_000
    take = Take.open(tmp_path / "talk.take")
    assert (take.num_frames, take.is_whole) == (25, True)


def test_each_name_is_there() -> None:
    names = set(turbotalk_core._MODULES)
    assert names <= set(dir(turbotalk_core))
    for name in names:
        assert getattr(turbotalk_core, name).__name__ == name
    assert {f"tt.{name}" for name in names} >= set(re.findall(r"tt\.\w+", _example()))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = turbotalk_core.nothing


def test_types_are_told_of_the_same_names() -> None:
    source = Path(turbotalk_core.__file__).read_text()
    imported = re.findall(r"^    from (\S+) import (\w+) as (\w+)$", source, re.MULTILINE)
    assert {name: module for module, name, _ in imported} == turbotalk_core._MODULES
    assert all(name == shown for _, name, shown in imported)


def test_importing_the_package_alone_loads_nothing() -> None:
    program = "import sys, turbotalk_core; print(*{'torch', 'av', 'transformers'} & {*sys.modules})"
    told = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert told.stdout.strip() == ""
