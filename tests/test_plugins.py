"""Plugins through entry points: found by name, harmless when broken."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from tests.imports import ROOT

PLUGIN = ROOT / "examples" / "moezoo_plugin"


def installed(tmp_path: Path, entry: str) -> None:
    """The plugin as pip would lay it out, with the given entry point."""
    (tmp_path / "moezoo_plugin.py").write_text((PLUGIN / "moezoo_plugin.py").read_text())
    info = tmp_path / "moezoo_plugin-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: moezoo-plugin\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text(f"[moezoo.capacity]\n{entry}\n")


def run(tmp_path: Path, code: str) -> str:
    paths = [str(tmp_path), str(ROOT)]
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", f"import sys; sys.path[:0] = {paths}\n{code}"],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )  # fmt: skip
    return done.stdout + done.stderr


def test_an_installed_plugin_is_found_by_name(tmp_path: Path) -> None:
    text = (PLUGIN / "pyproject.toml").read_text()
    installed(tmp_path, "every_other = moezoo_plugin:EveryOther")
    assert 'every_other = "moezoo_plugin:EveryOther"' in text
    code = """
import torch, moezoo
assert "every_other" in moezoo.capacity.names()
layer = moezoo.SparseMLP(8, 16, 1, capacity="every_other")
with moezoo.record(layer) as tape:
    layer(torch.randn(10, 8))
print("dropped", tape.stats()["moe"].dropped)
"""
    assert "dropped 0.5" in run(tmp_path, code)


def test_pip_installs_the_plugin_and_its_entry_point_is_found(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "site"
    shutil.copytree(PLUGIN, source, ignore=shutil.ignore_patterns("build", "*.egg-info"))
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    command += ["--no-build-isolation", "--disable-pip-version-check", "--target", str(target)]
    done = subprocess.run([*command, str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    code = """
import moezoo
assert "moezoo_plugin" not in sys.modules
policy = moezoo.capacity.build("every_other")
print(type(policy).__name__, sys.modules["moezoo_plugin"].__file__)
"""
    out = run(target, code)
    assert "EveryOther" in out
    assert str(target) in out


def test_a_plugin_in_a_zip_file_is_found_too(tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    installed(tmp_path / "site", "every_other = moezoo_plugin:EveryOther")
    place = shutil.make_archive(str(tmp_path / "site"), "zip", tmp_path / "site")
    code = f"""
sys.path.insert(0, {place!r})
import moezoo
print(type(moezoo.capacity.build("every_other")).__name__)
"""
    assert "EveryOther" in run(tmp_path, code)


def test_nothing_is_imported_to_look_for_plugins_where_none_is_announced(tmp_path: Path) -> None:
    code = """
from moezoo.adapters.upcycle.recipe import Recipe
Recipe(8)
print(sorted({"importlib.metadata", "torch"} & set(sys.modules)))
"""
    assert "[]" in run(tmp_path, code)


def test_a_plugin_that_fails_to_import_is_named_and_the_rest_works(tmp_path: Path) -> None:
    installed(tmp_path, "broken = moezoo_plugin_that_is_not_there:Policy")
    code = "import moezoo; print(moezoo.capacity.build('dropless'))"
    out = run(tmp_path, code)
    assert "Dropless" in out
    assert "'broken'" in out
    assert "was not loaded" in out
