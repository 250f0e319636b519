"""Where `generate` and `report` get their texts: lines of a file, a field of its rows, a pipe."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

from moezoo.cli import main
from moezoo.training.session import save_with_tokenizer
from tests.training.text import small_model, tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model") / "model"
    save_with_tokenizer(small_model(), tokenizer(), path)
    return str(path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", b"\xef\xbb\xbfone\xe2\x80\xa8line\r\n\r\nthree\x0c\x0b\n"),
        ("a.csv", b'n,text\n1,"one\nsource"\n2,""\n3,x\n'),
        ("a.tsv", b'text\tn\n"one\t1\n\t2\nx\t3\n'),
        ("a.jsonl", b'{"text": "one\xe2\x80\xa8"}\n{"text": ""}\n{"text": "x"}\n'),
    ],
)
def test_generate_answers_every_text_of_a_file_in_its_order(
    name: str, content: bytes, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_bytes(content)
    words = ["generate", model, "--max-new-tokens", "3", "--batch-size", "2"]
    assert main([*words, "--file", str(tmp_path / name)]) == 0
    assert capsys.readouterr().out.count("\n") == 3
    if name != "a.txt":
        assert main([*words, "--file", str(tmp_path / name), "--text-field", "txt"]) == 2
        assert "has no text 'txt'. Did you mean 'text'?" in capsys.readouterr().err


def test_generate_reads_a_pipe_as_it_reads_a_file(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["generate", model, "--max-new-tokens", "3"]
    for content, code in ((b"one\r1\n\ntwo\x85\xe2\x80\xa8\n", 0), (b"one\n\xff\n", 3)):
        text = content.replace(b"\x85", b"\xc2\x85")
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text), "utf-8"))
        assert main(words) == code
    done = capsys.readouterr()
    assert done.out.count("\n") == 3
    assert "standard input: line 2 is not UTF-8 text" in done.err


def test_verbs_on_a_text_read_a_field_of_rows(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.csv").write_text("body\n" + '"a line\nof text"\n' * 60)
    words = ["quantize", model, "--length", "24", "--batches", "1", "--text"]
    assert main([*words, str(tmp_path / "a.csv")]) == 2
    assert "line 2 has no text 'text'. Known: body." in capsys.readouterr().err
    assert main([*words, str(tmp_path / "a.csv"), "--text-field", "body"]) == 0
