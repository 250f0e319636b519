"""Every command of docs/stacks.md works as it stands, and its tables name every row of the code."""

from __future__ import annotations

import runpy
import shlex
from pathlib import Path

import pytest
from safetensors.torch import load_file

from moezoo.adapters.families.dense_decoders import DENSE
from moezoo.adapters.families.sparse_decoders import SPARSE
from moezoo.cli import main
from tests.test_docs import ROOT, blocks

PAGE = ROOT / "docs/stacks.md"


def test_the_page_works_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (program,) = blocks(PAGE, "python")
    Path("page.py").write_text(program)
    runpy.run_path("page.py")
    for line in "\n".join(blocks(PAGE, "sh")).splitlines():
        words = shlex.split(line, comments=True)
        assert words[0] == "moezoo" and main(words[1:]) == 0, line
    before, after = (load_file(f"{name}/model.safetensors") for name in ("llama", "llama-again"))
    assert set(before) == set(after)
    assert all((tensor == after[name]).all() for name, tensor in before.items())


def test_the_page_names_every_row_and_every_field_that_is_refused() -> None:
    text = PAGE.read_text()
    for kind in DENSE.values():
        (row,) = [line for line in text.splitlines() if line.startswith("| ")
                  and f"`{kind.model_type}`" in line and f"`{kind.sibling}`" in line]  # fmt: skip
        assert SPARSE[kind.sibling].placement.words.removesuffix(" layers").split()[0] in row
        refusals = text.partition("## What is refused")[2]
        for field in kind.only:
            assert any(
                f"`{kind.model_type}`" in line and f"`{field}`" in line
                for line in refusals.splitlines()
            ), (kind.model_type, field)
