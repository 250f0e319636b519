"""What is packed: the package with its link resolved, documentation and changelog, and no tests."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

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
