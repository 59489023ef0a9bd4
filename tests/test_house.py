"""The repository keeps its rules: what is shipped, what is required, what is said and linked."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CORE = ROOT / "turbotalk_core"
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = SETTINGS["project"]

# ComfyUI's browser looks for templates in each of these, and serves them from only one.
TEMPLATE_FOLDERS = ("example_workflows", "example", "examples", "workflow", "workflows")

# What no text may name. Each pattern is split, so that it does not find itself here.
FOREIGN = {
    "a folder of one machine": r"(?<![\w.$}/-])/" + r"(?:home|root|Users|work|tmp)/\w",
    "a package index": r"(?:index|find)" + r"[-_](?:url|links)|pypi\.(?:org|python)/simple",
    "something left undone": r"\b(?:TO" + r"DO|FIX" + r"ME|XX" + r"X)\b",
}

DISTRIBUTIONS = {  # where a package is imported under another name
    "PIL": "pillow",
    "annotated_types": "annotated-types",
    "yaml": "pyyaml",
}


def _list_files() -> list[Path]:
    command = ["git", "-c", "safe.directory=*", "ls-files", "-z"]
    options = ["--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(
        command + options, cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    return [ROOT / name for name in listing.split("\0") if name and (ROOT / name).is_file()]


def _read_texts() -> dict[str, str]:
    contents = {path.relative_to(ROOT).as_posix(): path.read_bytes() for path in _list_files()}
    return {name: data.decode() for name, data in contents.items() if b"\0" not in data}


def _name_of(requirement: str) -> str:
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert match, f"no package name in {requirement!r}"
    return match[0].lower()


def _list_third_party_imports(folder: Path) -> set[str]:
    packages: set[str] = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                packages |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                packages.add(str(node.module).split(".")[0])
    return {DISTRIBUTIONS.get(name, name).lower() for name in packages - sys.stdlib_module_names}


def _slug(heading: str) -> str:
    words = re.sub(r"[^\w\- ]", "", heading.strip().lower())
    return words.replace(" ", "-")


class TestPackaging:
    def test_the_wheel_holds_the_core_alone(self, tmp_path: Path) -> None:
        source, out = tmp_path / "source", tmp_path / "out"
        for path in _list_files():
            if path.suffix in {".py", ".toml", ".md"} or path.name == "LICENSE":
                copy = source / path.relative_to(ROOT)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy)
        build = f"from setuptools import build_meta; build_meta.build_wheel({str(out)!r})"
        out.mkdir()
        subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)

        (wheel,) = out.iterdir()
        assert wheel.name == f"{PROJECT['name']}-{PROJECT['version']}-py3-none-any.whl"
        names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
        expected = {path.relative_to(ROOT).as_posix() for path in CORE.rglob("*.py")}
        assert names == expected

    def test_the_core_declares_what_it_imports(self) -> None:
        declared = {_name_of(requirement) for requirement in PROJECT["dependencies"]}
        assert _list_third_party_imports(CORE) == declared

    def test_tools_do_not_import_tests(self) -> None:
        imports = _list_third_party_imports(ROOT / "tools")
        assert "turbotalk_core" in imports
        assert "tests" not in imports

    def test_training_declares_what_it_imports(self) -> None:
        extras = PROJECT["optional-dependencies"]
        dependencies = PROJECT["dependencies"] + extras["train"]
        declared = {_name_of(requirement) for requirement in dependencies}
        ours = {"training", "turbotalk_core"}
        imports = _list_third_party_imports(ROOT / "training") - ours
        more = {_name_of(requirement).replace("-", "_") for requirement in extras["metrics"]}
        assert imports - more <= declared
        assert imports - declared == more

    def test_the_changelog_tells_of_this_version(self) -> None:
        changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
        versions = re.findall(r"^## \[(\d[^\]]*)\]", changelog, re.MULTILINE)
        assert versions[0] == PROJECT["version"]

    def test_requirements_are_few_loose_and_explained(self) -> None:
        lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
        requirements = [line for line in lines if line and not line.startswith("#")]
        assert requirements
        declared = {_name_of(requirement) for requirement in PROJECT["dependencies"]}
        for line in requirements:
            requirement, _, reason = line.partition("#")
            assert reason.strip(), f"{line!r} does not say who needs it"
            assert "==" not in requirement, f"{line!r} pins what ComfyUI shares with other packs"
            assert not _name_of(requirement).startswith("torch"), "a host brings its own torch"
            assert _name_of(requirement) in declared, f"{line!r} is unknown to pyproject.toml"

    def test_the_registry_finds_what_it_asks_for(self) -> None:
        comfy = SETTINGS["tool"]["comfy"]
        assert re.fullmatch(r"[a-z][a-z0-9-]{1,98}", PROJECT["name"])
        assert "comfyui" not in PROJECT["name"]
        assert re.fullmatch(r"\d+\.\d+\.\d+", PROJECT["version"])
        assert PROJECT["urls"]["Repository"].startswith("https://")
        assert comfy["PublisherId"]
        assert re.fullmatch(r">=\d+\.\d+\.\d+", comfy["requires-comfyui"])


class TestWorkflows:
    def test_there_is_one_template_folder(self) -> None:
        assert [name for name in TEMPLATE_FOLDERS if (ROOT / name).exists()] == ["workflows"]

    def test_templates_are_in_the_editors_format(self) -> None:
        templates = sorted((ROOT / "workflows").glob("*.json"))
        assert templates
        for path in templates:
            graph = json.loads(path.read_text(encoding="utf-8"))
            assert isinstance(graph.get("nodes"), list), f"{path.name} opens as an empty canvas"

    def test_api_workflows_are_in_the_servers_format(self) -> None:
        workflows = sorted((ROOT / "workflows" / "api").glob("*.json"))
        assert workflows
        for path in workflows:
            prompt = json.loads(path.read_text(encoding="utf-8"))
            assert all({"class_type", "inputs"} <= node.keys() for node in prompt.values()), path


class TestText:
    """What is written speaks of the project alone, to anyone, on any machine."""

    @pytest.mark.parametrize("what", FOREIGN)
    def test_no_text_names(self, what: str) -> None:
        pattern = re.compile(FOREIGN[what])
        found = [
            f"{name}:{number}: {line.strip()[:120]}"
            for name, text in _read_texts().items()
            for number, line in enumerate(text.splitlines(), 1)
            if pattern.search(line)
        ]
        assert not found

    def test_links_in_documents_lead_somewhere(self) -> None:
        texts = _read_texts()
        broken = []
        for name, text in texts.items():
            if not name.endswith(".md"):
                continue
            prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
            for link in re.findall(r"\]\(([^)\s]+)\)", prose):
                if re.match(r"[a-z]+:", link):
                    continue
                target, _, anchor = link.partition("#")
                path = (ROOT / name).parent / target if target else ROOT / name
                headings = (
                    re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
                    if path.suffix == ".md" and path.is_file()
                    else []
                )
                if not path.exists() or (anchor and anchor not in map(_slug, headings)):
                    broken.append(f"{name}: {link}")
        assert not broken

    def test_files_that_documents_name_exist(self) -> None:
        roots = (ROOT, CORE, ROOT / "training")
        named = {
            (name, path)
            for name, text in _read_texts().items()
            if name.endswith(".md") and name != "CHANGELOG.md"  # which names what was, too
            for path in re.findall(r"`((?:\w+/)+\w+\.py)`", text)
        }
        assert len(named) > 20
        assert not [
            (name, path) for name, path in named if not any((r / path).is_file() for r in roots)
        ]
