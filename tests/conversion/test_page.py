"""Every command of docs/conversion.md works as it stands."""

from __future__ import annotations

import runpy
import shlex
from pathlib import Path

import pytest

import moezoo
from moezoo.adapters.upcycle.inits import expert_inits, router_inits
from moezoo.cli import main
from tests.test_docs import ROOT, blocks

PAGE = ROOT / "docs/conversion.md"


def test_the_page_works_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    setting, *_ = blocks(PAGE, "python")
    Path("setting.py").write_text(setting)
    runpy.run_path("setting.py")
    (recipe,) = blocks(PAGE, "toml")
    Path("recipe.toml").write_text(recipe)
    for line in "\n".join(blocks(PAGE, "sh")).splitlines():
        if not (words := shlex.split(line, comments=True)):
            continue
        assert words[0] == "moezoo" and main(words[1:]) == 0, line
    for one, other in (("switch", "theirs"), ("t5", "t5-again"), ("noisy", "noisy-again")):
        weights = [moezoo.load(tmp_path / name).state_dict() for name in (one, other)]
        assert all((weights[0][name] == weights[1][name]).all() for name in weights[0])
    assert (Path("noisy") / "model.safetensors").read_bytes() == (
        Path("noisy-again") / "model.safetensors"
    ).read_bytes()
    assert len(Path("recipe.toml").read_bytes()) < 2048


def test_the_page_names_every_initialisation() -> None:
    rows = PAGE.read_text().split("## What is exact")[1]
    for name in (*expert_inits.names(), *router_inits.names()):
        assert f"| `{name}" in rows, name
