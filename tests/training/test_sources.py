"""Where text, pairs and settings of the training verbs come from, and where numbers go."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

import moezoo
from moezoo.cli import main
from moezoo.training.corpus import file_documents, fingerprint
from moezoo.training.datasets import dataset_documents, dataset_rows
from moezoo.training.evaluation import chosen_task, task_pairs
from moezoo.training.session import save_with_tokenizer
from tests.training.text import small_model, tokenizer

SETTINGS = """
steps = 2
batch-size = 4
recipe = "small"
input-length = 32
text = ["{text}"]
from = "{source}"

[set]
router = {{name = "switch", jitter = 0.01}}
"""


@pytest.fixture
def settings(tmp_path: Path) -> Path:
    """A settings file, the checkpoint and the text that it names."""
    source, text, file = tmp_path / "model", tmp_path / "text.txt", tmp_path / "run.toml"
    save_with_tokenizer(small_model(), tokenizer(), source)
    text.write_text("\n\n".join(f"a line about item {i}. " * 9 for i in range(40)))
    file.write_text(SETTINGS.format(text=text, source=source))
    return file


def run_of(settings: Path, *words: object) -> dict[str, object]:
    out = settings.parent / "out"
    assert main([str(w) for w in ("train", out, *words)]) == 0
    facts = json.loads((out / "config.json").read_text())
    assert isinstance(facts, dict)
    return facts


def test_settings_come_from_a_file_and_flags_win_wherever_they_stand(settings: Path) -> None:
    facts = run_of(settings, "--batch-size", 3, "--settings", settings, "--steps", 1)
    assert (facts["steps"], facts["batch_size"], facts["input_length"]) == (1, 3, 32)
    assert facts["model"]["router"] == {"name": "switch", "jitter": 0.01}
    assert facts["recipe"]["optimizer"] == "adamw"


def test_settings_may_be_json(settings: Path) -> None:
    file = settings.with_suffix(".json")
    folder = settings.parent
    values = {"steps": 1, "from": str(folder / "model"), "text": [str(folder / "text.txt")]}
    values |= {"batch_size": 2, "input_length": 32, "recipe": "finetune"}
    file.write_text(json.dumps(values))
    facts = run_of(settings, "--settings", file)
    assert facts["batch_size"] == 2
    assert facts["model"]["dropout_rate"] == 0.1
    assert facts["model"]["experts"] == {"name": "stacked", "dropout": 0.4}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("stepps = 3", "unknown setting 'stepps'; Did you mean 'steps'"),
        ('steps = "x"', "invalid int value"),
        ("steps = 1.5", "invalid int value"),
        ('schedule = "cosine"', "invalid choice"),
        ("resume = 3", "true or false"),
        ('text = "one.txt"', "expected a list"),
        ("steps =", "cannot be read as TOML"),
    ],
)
def test_bad_settings_are_named(
    line: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.toml").write_text(line)
    words = ["train", str(tmp_path / "out"), "--settings", str(tmp_path / "run.toml")]
    try:
        code = main(words)
    except SystemExit as usage:
        code = usage.code
    assert code in (2, 3)
    assert message in capsys.readouterr().err


def test_set_names_an_unknown_field_and_a_word_without_value(
    settings: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", str(settings.parent / "out"), "--settings", str(settings), "--set"]
    assert main([*words, "routr=switch"]) == 2
    assert "router" in capsys.readouterr().err
    assert main([*words, "router"]) == 2
    assert "FIELD=VALUE" in capsys.readouterr().err


def test_a_field_of_jsonl_can_be_chosen(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"body": "one"}\n')
    assert [d.text for d in file_documents([file], field="body")] == ["one"]
    with pytest.raises(moezoo.MoezooError, match="'text'"):
        file_documents([file])


def test_the_fingerprint_of_data_sees_order_and_borders() -> None:
    assert fingerprint(["a", "b"]) == fingerprint(iter(["a", "b"]))
    assert len({fingerprint(t) for t in (["a", "b"], ["b", "a"], ["ab"], ["a", "b", ""])}) == 4


def test_data_sets_give_text_and_pairs_or_say_how_to_get_them(tmp_path: Path) -> None:
    try:
        import datasets
    except ImportError:
        with pytest.raises(moezoo.MoezooError, match="pip install"):
            dataset_rows("any")
        return
    rows = [{"text": f"text {i}", "translation": {"en": f"e{i}", "de": f"d{i}"}} for i in range(20)]
    path = str(tmp_path / "saved")
    table = datasets.table.InMemoryTable.from_pylist(rows)
    # With a fingerprint of ours the library need not pickle the table's classes for its own.
    made = datasets.Dataset(table, fingerprint="rows")
    datasets.DatasetDict({"train": made}).save_to_disk(path)
    assert [d.text for d in dataset_documents(path)] == [row["text"] for row in rows]
    with pytest.raises(moezoo.MoezooError, match="no field 'txt'"):
        dataset_documents(path, field="txt")
    with pytest.raises(moezoo.MoezooError, match="no split 'tran'"):
        dataset_rows(f"{path}:tran")
    names = ("source_field", "target_field", "prefix", "num_beams", "pairs", "held_out_pairs")
    settings = dict.fromkeys(names) | {"no_header": False}
    arguments = argparse.Namespace(**settings, task="translation", dataset=path)
    train, held = task_pairs(arguments, chosen_task(arguments))
    assert len(train) == 18
    assert held == [("e9", "d9"), ("e19", "d19")]


def test_tensorboard_holds_the_numbers_of_the_log_or_says_how_to_get_it(
    settings: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--settings", settings, "--tensorboard"]
    try:
        from tensorboard.backend.event_processing import event_accumulator
    except ImportError:
        out = str(settings.parent / "out")
        assert main(["train", out, *map(str, words)]) == 2
        assert "pip install" in capsys.readouterr().err
        return
    run_of(settings, *words)
    found = event_accumulator.EventAccumulator(str(settings.parent / "out" / "tensorboard"))
    found.Reload()
    lines = (settings.parent / "out" / "metrics.jsonl").read_text().splitlines()
    losses = [row["loss"] for row in map(json.loads, lines) if "loss" in row]
    assert [event.value for event in found.Scalars("loss")] == pytest.approx(losses)
    assert {"losses/cross_entropy", "dropped", "held_out"} <= set(found.Tags()["scalars"])
