"""`moezoo generate`: options, batches, what a person types."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import moezoo
from moezoo.cli import main


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("generate") / "model"
    sizes = {"vocab_size": 384, "d_model": 8, "d_kv": 4, "d_ff": 12, "num_heads": 2}
    model: Any = moezoo.build(moezoo.SwitchConfig(**sizes, num_layers=2), seed=0)
    with torch.no_grad():
        model.shared.weight.mul_(0.5)
    model.generation = model.generation.replace(max_new_tokens=5, penalty_alpha=0.6)
    moezoo.save(model, path)
    settings = {"tokenizer_class": "ByT5Tokenizer", "extra_ids": 125}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return str(path)


def lines(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    assert main(["generate", *words, "--without", "penalty_alpha"]) == 0
    return capsys.readouterr().out.splitlines()


def test_it_prints_every_sequence_with_its_score(
    checkpoint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--num-beams", "3", "--num-return-sequences", "2", "--scores", "--min-length", "5")
    found = lines(capsys, checkpoint, "one", "two", *words, "--keep-special")
    scores = [float(line.partition("\t")[0]) for line in found]
    assert len(scores) == 4
    assert scores[0] >= scores[1] and scores[2] >= scores[3]


@pytest.mark.parametrize(
    ("name", "content", "count"),
    [
        ("a.txt", "one\n\ntwo\n", 3),
        ("a.csv", "text\none\n\ntwo\n", 3),
        ("a.tsv", "text\tn\none\t1\n\t2\n\ntwo\t3\n", 3),
        ("a.jsonl", '{"text": "one"}\n\n{"text": ""}\n{"text": "two"}\n', 3),
    ],
)
def test_every_line_or_row_is_answered_in_order_empty_ones_too(
    name: str,
    content: str,
    count: int,
    checkpoint: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / name).write_text(content)
    words = ("--file", str(tmp_path / name), "--scores", "--without", "penalty_alpha")
    assert main(["generate", checkpoint, *words]) == 0
    found = capsys.readouterr().out.split("\n")[:-1]
    assert len(found) == count
    assert main(["generate", checkpoint, "one", "", "two", *words[2:]]) == 0
    assert found == capsys.readouterr().out.split("\n")[:-1]


def test_a_prompt_begins_every_answer(checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = lines(capsys, checkpoint, "one", "two", "--decoder-prompt", "So: ")
    assert [line[:4] for line in found] == ["So: ", "So: "]


def test_options_are_refused_before_the_checkpoint_is_looked_at(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["generate", "nowhere", "text", "--early-stopping", "sometimes"]) == 2
    assert "bad early_stopping; expected true, false" in capsys.readouterr().err


def test_what_the_checkpoint_asks_for_in_vain_is_named(
    checkpoint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", checkpoint, "text"]) == 2
    assert "--without penalty_alpha" in capsys.readouterr().err


def test_settings_take_lists_and_flags_win(
    checkpoint: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    settings = tmp_path / "settings.toml"
    settings.write_text('suppress_tokens = [1]\nmax_new_tokens = 9\nearly_stopping = "never"\n')
    words = ("--settings", str(settings), "--max-new-tokens", "3", "--scores")
    assert len(lines(capsys, checkpoint, "one", *words)) == 1


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("how", "expected"), [("texts", [3]), ("file", [3]), ("typed", [1, 1, 1]), ("piped", [3])]
)
def test_only_what_a_person_types_is_answered_one_by_one(
    how: str,
    expected: list[int],
    checkpoint: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    (tmp_path / "sources").write_text("a\nb\nc\n")
    words = {"texts": ["a", "b", "c"], "file": ["--file", str(tmp_path / "sources")]}.get(how, [])
    said = "a\nb\nc\n"
    piped = io.TextIOWrapper(io.BytesIO(said.encode()), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", piped if how == "piped" else Terminal(said))
    sizes: list[int] = []
    generate = moezoo.SwitchForConditionalGeneration.generate

    def counted(self: Any, ids: torch.Tensor, *inputs: Any, **options: Any) -> Any:
        sizes.append(ids.shape[0])
        return generate(self, ids, *inputs, **options)

    monkeypatch.setattr(moezoo.SwitchForConditionalGeneration, "generate", counted)
    assert len(lines(capsys, checkpoint, *words)) == 3
    assert sizes == expected
