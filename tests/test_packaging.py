"""What is packed: the package with its link resolved, documentation and changelog, and no tests."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def described(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which setuptools describes a source distribution."""
    pytest.importorskip("setuptools", minversion="77")
    base = tmp_path_factory.mktemp("egg")
    command = [sys.executable, "setup.py", "--quiet", "egg_info", "--egg-base", str(base)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return base / "moezoo.egg-info"


def test_a_source_distribution_has_docs_and_changelog_and_no_tests(described: Path) -> None:
    lines = (described / "SOURCES.txt").read_text().splitlines()
    files = {line.removeprefix("./") for line in lines}
    assert {"CHANGELOG.md", "CONTRIBUTING.md", "docs/training.md", "docs/routers/top_k.md"} <= files
    assert {"moezoo/adapters/plug.py", "moezoo/adapters/hf/base.py", "moezoo/py.typed"} <= files
    assert {"examples/01_build.py", "constraints.txt", "Makefile"} <= files
    assert not [name for name in files if name.startswith(("tests/", "benchmarks/", "out/"))]


def test_the_readme_of_an_index_has_no_link_that_leads_nowhere(described: Path) -> None:
    text = (described / "PKG-INFO").read_text()
    assert "\n# moezoo\n" in text
    targets = re.findall(r"\]\(([^)]*)\)", text)
    assert targets and all(re.match("https?://", target) for target in targets)
    assert "<img" not in text and "[conversion]" not in text


def test_adapters_lie_inside_the_package_for_type_checkers_too() -> None:
    inside = ROOT / "moezoo" / "adapters"
    assert inside.resolve() == ROOT / "adapters" and (inside / "__init__.py").is_file()
    import moezoo.adapters

    assert len(moezoo.adapters.__path__) == 1


def pins() -> dict[str, str]:
    """What constraints.txt holds: version by normal name."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = (line.split("==") for line in lines if not line.startswith("#"))
    return {_normal(name): version for name, version in pairs}


def _normal(name: str) -> str:
    return re.sub("[-_.]+", "-", name).lower()


def test_what_is_pinned_can_be_installed_together() -> None:
    pinned = pins()
    # The index's torch for Linux asks for one triton; a build for CPUs alone, as may be installed
    # here, asks for none, and what pip made of it could be installed nowhere else.
    assert (pinned["torch"], pinned["triton"]) == ("2.13.0", "3.7.1")
    wrong = []
    for name, version in pinned.items():
        try:
            asked = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue  # an extra that is not installed
        if asked.version.split("+")[0] != version:
            continue
        for need in map(Requirement, asked.requires or ()):
            if need.marker and not need.marker.evaluate({"extra": ""}):
                continue
            held = pinned.get(_normal(need.name))
            if held and not need.specifier.contains(held, prereleases=True):
                wrong.append(f"{name}=={version} asks for {need}, {held} is pinned")
    assert wrong == []


def test_pins_are_within_what_pyproject_asks_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    needs = map(Requirement, [*project["dependencies"], *(n for names in extras for n in names)])
    asked = [need for need in needs if _normal(need.name) in pins()]
    assert len(asked) > 15
    assert [str(n) for n in asked if not n.specifier.contains(pins()[_normal(n.name)])] == []
