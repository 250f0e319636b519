"""generation_config.json is honoured and kept whole, whatever is done with a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import moezoo
from moezoo.cli import main

FIELDS = {"num_beams": 3, "max_new_tokens": 7, "length_penalty": 0.5, "later": {"x": [1, None]}}
SIZES = {"vocab_size": 60, "d_model": 8, "d_kv": 4, "d_ff": 12, "num_heads": 2, "num_layers": 2}


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    model: Any = moezoo.build(moezoo.SwitchConfig(**SIZES), seed=0)
    moezoo.save(model, tmp_path / "dense")
    (tmp_path / "dense" / "generation_config.json").write_text(json.dumps(FIELDS))
    return tmp_path / "dense"


def fields(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / "generation_config.json").read_text())
    return found


def test_load_and_save_keep_every_field(dense: Path, tmp_path: Path) -> None:
    moezoo.save(moezoo.load(dense), tmp_path / "again")
    ids = {"decoder_start_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
    assert fields(tmp_path / "again") == {**ids, **FIELDS}
    moezoo.save(moezoo.load(dense, task="encoder"), tmp_path / "encoder")
    assert not (tmp_path / "encoder" / "generation_config.json").exists()


def test_generate_does_what_the_checkpoint_says(dense: Path) -> None:
    model: Any = moezoo.load(dense)
    ids = torch.randint(2, 60, (2, 5))
    said = model.generate(ids)
    model.generation = model.generation.replace(num_beams=None, max_new_tokens=None)
    asked = {"num_beams": 3, "max_new_tokens": 7, "length_penalty": 0.5}
    assert torch.equal(said, model.generate(ids, **asked))
    assert model.generate(ids, min_new_tokens=20).shape[1] == 21
    overridden: Any = moezoo.load(dense, eos_token_id=9)
    assert overridden.config.eos_token_ids == (9,)


def test_conversions_keep_every_field(dense: Path, tmp_path: Path) -> None:
    switch, more, back = (tmp_path / name for name in ("switch", "more", "back"))
    exported = tmp_path / "exported"
    assert main(["upcycle", str(dense), str(switch), "--experts", "2"]) == 0
    assert main(["grow", str(switch), str(more), "--factor", "2"]) == 0
    assert main(["export", str(switch), str(exported), "--dtype", "bfloat16"]) == 0
    assert main(["downcycle", str(switch), str(back)]) == 0
    for path in (switch, more, exported, back):
        assert fields(path) == FIELDS
    live: Any = moezoo.upcycle(moezoo.load(dense), num_experts=2)
    assert live.generation.values == FIELDS
    down: Any = moezoo.downcycle(live)
    assert down.generation.values == FIELDS


def test_fields_in_an_old_config_count_and_become_a_file(dense: Path, tmp_path: Path) -> None:
    (dense / "generation_config.json").unlink()
    config = json.loads((dense / "config.json").read_text())
    old = {"num_beams": 2, "no_repeat_ngram_size": 3, "early_stopping": True}
    (dense / "config.json").write_text(json.dumps({**config, **old, "task_specific_params": {}}))
    model: Any = moezoo.load(dense)
    assert model.generation.values == old
    assert main(["upcycle", str(dense), str(tmp_path / "switch"), "--experts", "2"]) == 0
    assert fields(tmp_path / "switch").items() >= old.items()


def test_a_corrupt_file_is_named(dense: Path) -> None:
    (dense / "generation_config.json").write_text("{")
    with pytest.raises(moezoo.MoezooError, match="generation_config.json: not valid JSON"):
        moezoo.load(dense)


@pytest.mark.parametrize("old", [False, True])
def test_transformers_generates_the_same_from_the_same_directory(
    old: bool, dense: Path, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    from moezoo.adapters.hf import MoezooForConditionalGeneration
    from moezoo.adapters.transformers import from_transformers, to_transformers

    said = {"num_beams": 3, "max_length": 9, "no_repeat_ngram_size": 2, "forced_bos_token_id": 5}
    ids = {"decoder_start_token_id": 0, "eos_token_id": [1, 8], "pad_token_id": 3}
    path = dense / ("config.json" if old else "generation_config.json")
    before = json.loads((dense / "config.json").read_text()) if old else {}
    if old:
        (dense / "generation_config.json").unlink()
    path.write_text(json.dumps({**before, **ids, **said}))
    reference = transformers.T5ForConditionalGeneration.from_pretrained(dense)
    model: Any = moezoo.load(dense)
    source = torch.randint(2, 60, (3, 5), generator=torch.Generator().manual_seed(0))
    expected = reference.generate(input_ids=source)
    assert torch.equal(model.generate(source), expected)
    others = (
        from_transformers(reference),
        to_transformers(model),
        MoezooForConditionalGeneration.wrap(model),
    )
    for other in others:
        assert torch.equal(other.generate(source), expected)  # type: ignore[operator]
