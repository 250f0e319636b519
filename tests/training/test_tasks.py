"""Tasks: pairs from files and from Python's own sources, and metrics with known values."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

import moezoo
from moezoo.training.batches import pair_batches, unknown_targets
from moezoo.training.evaluation import measurable, measured
from moezoo.training.tasks import (
    METRICS,
    Task,
    docstring_pairs,
    exact_match,
    identifier_pairs,
    read_pairs,
    split_pairs,
    task,
    token_f1,
)


def test_pairs_come_from_jsonl_csv_and_the_nested_form(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"s": "x", "t": "y"}\n')
    (tmp_path / "b.csv").write_text('s,t\n"x, 1",y\n')
    (tmp_path / "c.jsonl").write_text('{"translation": {"en": "x", "de": "y"}}\n')
    assert read_pairs(tmp_path / "a.jsonl", source="s", target="t") == [("x", "y")]
    assert read_pairs(tmp_path / "b.csv", source="s", target="t") == [("x, 1", "y")]
    assert read_pairs(tmp_path / "c.jsonl", source="en", target="de") == [("x", "y")]
    with pytest.raises(moezoo.MoezooError, match="no text 'u'"):
        read_pairs(tmp_path / "a.jsonl", source="s", target="u")
    (tmp_path / "a.jsonl").write_text("{\n")
    with pytest.raises(moezoo.MoezooError, match="line 1"):
        read_pairs(tmp_path / "a.jsonl", source="s", target="t")
    with pytest.raises(moezoo.MoezooError, match="nowhere.jsonl: cannot be read: No such file"):
        read_pairs(tmp_path / "nowhere.jsonl", source="s", target="t")
    with pytest.raises(moezoo.MoezooError, match="translation"):
        task("translaton")


def test_a_table_without_a_header_has_its_columns_named(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("one\teins\ntwo\tzwei\n")
    found = read_pairs(tmp_path / "a.tsv", source="s", target="t", header=False)
    assert found == [("one", "eins"), ("two", "zwei")]
    with pytest.raises(moezoo.MoezooError, match="fields are one, eins.*--no-header"):
        read_pairs(tmp_path / "a.tsv", source="s", target="t")
    (tmp_path / "b.csv").write_text("one,eins,1\n")
    with pytest.raises(moezoo.MoezooError, match="line 1 .*columns than s, t; expected 2, found 3"):
        read_pairs(tmp_path / "b.csv", source="s", target="t", header=False)


def test_pairs_of_a_known_task_name_it(tmp_path: Path) -> None:
    for fields, name in (({"en": "x", "de": "y"}, "translation"),
                         ({"document": "x", "summary": "y"}, "summarization")):  # fmt: skip
        (tmp_path / "a.jsonl").write_text(json.dumps(fields))
        with pytest.raises(moezoo.MoezooError, match=f"Pass --task {name}, or say --source-field"):
            read_pairs(tmp_path / "a.jsonl", source="source", target="target")


def test_a_metric_whose_package_is_missing_is_left_out_and_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    said: list[str] = []
    kept = measurable(task("translation"), said.append)
    assert kept.metrics == ("exact_match",) and kept.prefix == task("translation").prefix
    assert len(said) == 1 and "bleu will not be measured" in said[0]
    assert "pip install '.[train]'" in said[0]


def test_targets_with_unknown_text_are_counted(tmp_path: Path) -> None:
    tokenizer = moezoo.Tokenizer.train(
        ["one two three four", "five six"], tmp_path / "s.model", vocab_size=500, at_most=True
    )
    pairs = [("one", "two"), ("one", "ж three"), ("ж", "four"), ("two", "жж")]
    batches = pair_batches(pairs, tokenizer, batch_size=2)
    assert unknown_targets(batches, tokenizer.unk_id) == (2, 1)
    assert unknown_targets(batches, moezoo.ByteTokenizer().unk_id) == (0, None)


def test_toy_tasks_have_pairs_split_by_module() -> None:
    for pairs in (identifier_pairs(), docstring_pairs()):
        train, held = split_pairs(pairs)
        assert len(train) > 1000
        assert len(held) > 50
    words = dict(pair for _, pair in identifier_pairs())
    assert words["get_docstring"] == "get docstring"
    assert words["HTTPServer"] == "http server"


def test_metrics_have_known_values() -> None:
    assert exact_match(["a b", "c"], ["a b", "d"]) == 0.5
    assert token_f1(["a b", "c"], ["a b", "d"]) == 0.5
    assert token_f1(["a b c d"], ["a b"]) == pytest.approx(2 * 2 / 6)
    assert exact_match([], []) == 0.0


@pytest.mark.parametrize("name", ["bleu", "rouge_l"])
def test_metrics_of_other_packages_work_or_say_how_to_get_them(name: str) -> None:
    package = {"bleu": "sacrebleu", "rouge_l": "rouge_score"}[name]
    try:
        __import__(package)
    except ImportError:
        with pytest.raises(moezoo.MoezooError, match="pip install"):
            METRICS[name](["a"], ["a"])
        return
    answer = "the cat sat on the mat"
    best = METRICS[name]([answer], [answer])
    assert best == pytest.approx(100 if name == "bleu" else 1.0)
    assert METRICS[name](["nothing alike"], [answer]) < best / 10


def test_the_loss_of_an_evaluation_is_over_every_pair() -> None:
    sizes = {"vocab_size": 384, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_heads": 2, "num_layers": 2}
    model = moezoo.build(moezoo.SwitchConfig(**sizes), seed=0)
    tokenizer, short = moezoo.ByteTokenizer(), Task(max_target=4)
    pairs = [(f"number {i}", "ab" if i < 16 else "zzz") for i in range(18)]  # a batch is 16
    total = count = 0.0
    for source, target in pairs:
        labels = torch.tensor([tokenizer.encode(target)])
        with torch.no_grad():
            loss = model(torch.tensor([tokenizer.encode(source)]), labels=labels).loss
        total, count = total + float(loss) * labels.numel(), count + labels.numel()
    found, _ = measured(model, tokenizer, pairs, short)
    assert found["cross_entropy"] == pytest.approx(total / count, rel=1e-5)
