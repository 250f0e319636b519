"""`moezoo quantize` says what int8 costs, and what it left alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import moezoo
from moezoo import cli
from moezoo.quantization import relative_error
from moezoo.tokenizer import tokenizer_of
from moezoo.training.batches import packed_ids, span_corruption_batches
from moezoo.training.corpus import file_documents
from moezoo.training.span_corruption import SpanCorruption

CONFIG = moezoo.SwitchConfig(
    vocab_size=400, d_model=16, d_kv=4, d_ff=24, num_heads=2, num_layers=2, num_experts=4
)


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    moezoo.save(moezoo.build(CONFIG, seed=0), tmp_path / "model")
    settings = {"tokenizer_class": "ByT5Tokenizer", "extra_ids": 125}
    (tmp_path / "model/tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "text.txt").write_text("An expert is chosen by <its> router.\n" * 60)
    source, text = str(tmp_path / "model"), str(tmp_path / "text.txt")
    return f"quantize {source} --text {text} --batches 1 --batch-size 2 --length 32".split()


def test_the_figures_are_those_of_the_quantised_model(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    tokenizer = tokenizer_of(words[1])
    documents = packed_ids(file_documents([words[3]]), tokenizer)
    corruption = SpanCorruption(tokenizer)
    batch = span_corruption_batches(documents, corruption, input_length=32, batch_size=2)(0)
    model = moezoo.load(words[1])
    with torch.no_grad():
        expected = model(**batch)
        moezoo.quantize(model)
        rounded = model(**batch)
    real = batch["labels"] != -100
    error = relative_error(expected.logits[real], rounded.logits[real])
    assert found["relative_error"] == pytest.approx(error, rel=1e-3)
    assert 0 < error < 0.2
    assert found["loss"] == pytest.approx(float(expected.losses["cross_entropy"]), rel=1e-4)
    assert found["loss_int8"] == pytest.approx(float(rounded.losses["cross_entropy"]), rel=1e-4)
    assert found["mib_int8"] < found["mib"]
    assert "routers decide in float32" in found["skipped"].values()


def test_it_prints_what_was_kept_and_writes_nothing(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(Path(words[1]).iterdir())
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    assert "error of the logits" in out
    assert "routers decide in float32" in out
    assert sorted(Path(words[1]).iterdir()) == before


def test_no_batch_is_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    words[words.index("--batches") + 1] = "0"
    assert cli.main(words) != 0
    assert "--batches" in capsys.readouterr().err
