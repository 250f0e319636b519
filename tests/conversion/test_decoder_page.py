"""Every command of docs/stacks.md works as it stands, and its tables name every row of the code."""

from __future__ import annotations

import runpy
import shlex
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

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


def test_the_page_says_of_every_other_dense_decoder_why_it_has_no_row() -> None:
    """Of those with a width of the MLP and grouped heads, as decoders of this decade have them."""
    refusals = PAGE.read_text().partition("Dense decoders without a row")[2]
    refusals = refusals.partition("Of a sparse model")[0]
    found = set()
    for model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        if model_type == "gemma4_assistant":  # drafts for Gemma 4, and has no config of its own
            continue
        names = set(CONFIG_MAPPING[model_type]().to_dict())
        sparse = any("expert" in name for name in names)
        if {"intermediate_size", "num_key_value_heads"} <= names and not sparse:
            found.add(model_type)
            assert (model_type in DENSE) != (f"`{model_type}`" in refusals), model_type
    assert len(found) > 50


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
