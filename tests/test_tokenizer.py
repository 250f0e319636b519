"""Tokenizers: equality with transformers, sentinels, round trips, corrupt files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import moezoo
from moezoo.tokenizer import tokenizer_of
from tests.training.text import tokenizer

TEXTS = [
    "Hello world",
    "The <extra_id_0> walks in <extra_id_1> park",
    "<extra_id_99>",
    "a  b   c",
    "x<extra_id_5>y",
    " lead and tail ",
    "tab\tnew\nline",
    "no <extra_id_100> sentinel",
    "ünï©ödé 漢字",
    "",
]


def test_sentencepiece_ids_equal_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    ours = tokenizer()
    (tmp_path / "spiece.model").write_bytes(ours.path.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    theirs = transformers.T5Tokenizer.from_pretrained(tmp_path)
    assert ours.vocab_size == len(theirs) == 500
    for text in TEXTS:
        assert ours.encode(text) == theirs(text).input_ids, text
    for index in (0, 7, 99):
        assert ours.sentinel(index) == theirs.convert_tokens_to_ids(f"<extra_id_{index}>")


def test_byte_ids_equal_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    ours, theirs = moezoo.ByteTokenizer(), transformers.ByT5Tokenizer()
    assert ours.vocab_size == len(theirs)
    for text in TEXTS:
        assert ours.encode(text) == theirs(text).input_ids, text


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_bytes_round_trip(text: str) -> None:
    ours = moezoo.ByteTokenizer()
    if "<extra_id_" not in text:
        assert ours.decode(ours.encode(text)) == text


@given(st.lists(st.sampled_from("the cat sat on a mat and every object has type".split())))
def test_words_round_trip(words: list[str]) -> None:
    ours = tokenizer()
    assert ours.decode(ours.encode(" ".join(words))) == " ".join(words)


def test_special_tokens_are_shown_on_request() -> None:
    ours = tokenizer()
    ids = ours.encode("a <extra_id_3> b")
    assert "<extra_id_3>" in ours.decode(ids, skip_special=False)
    assert "extra_id" not in ours.decode(ids)
    assert ours.decode([0, *ids, 0], skip_special=False).startswith("<pad>")


def test_batches_are_padded_truncated_and_masked() -> None:
    batch = tokenizer().batch(
        ["the object", "the object has many more tokens than that"], max_length=5
    )
    assert batch.input_ids.shape == batch.attention_mask.shape == (2, 5)
    assert batch.input_ids[1, -1] == 1, "eos survives truncation"
    assert (batch.input_ids[batch.attention_mask == 0] == 0).all()


@pytest.mark.parametrize(
    "kind", ["missing", "empty", "html", "truncated", "giant piece", "directory"]
)
def test_a_bad_model_file_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "spiece.model"
    good = tokenizer().path.read_bytes()
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "html":
        path.write_text("<!doctype html><html></html>")
    elif kind == "truncated":
        path.write_bytes(good[: len(good) // 2])
    elif kind == "giant piece":
        giant = b"\x0a" + b"\x80\x80\x80\x08" + b"a" * (16 << 20)
        path.write_bytes(b"\x0a" + b"\x85\x80\x80\x08" + giant + good)
    elif kind == "directory":
        path = tmp_path
    with pytest.raises(moezoo.MoezooError) as caught:
        moezoo.Tokenizer(path)
    assert str(tmp_path) in str(caught.value)


def test_training_on_too_little_text_says_so(tmp_path: Path) -> None:
    with pytest.raises(moezoo.MoezooError, match="training failed"):
        moezoo.Tokenizer.train(["a b"], tmp_path / "spiece.model", vocab_size=5000)


def test_training_is_reproducible(tmp_path: Path) -> None:
    lines = [f"every object {i} has a type and a value" for i in range(200)]
    paths = [tmp_path / "one.model", tmp_path / "two.model"]
    for path in paths:
        moezoo.Tokenizer.train(lines, path, vocab_size=45)
    ids = [moezoo.Tokenizer(path).encode("every type has a value") for path in paths]
    assert ids[0] == ids[1]


def test_a_directory_tells_which_tokenizer_it_has(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    assert isinstance(tokenizer_of(tmp_path), moezoo.ByteTokenizer)
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(moezoo.MoezooError, match="spiece.model"):
        tokenizer_of(tmp_path)
    (tmp_path / "spiece.model").write_bytes(tokenizer().path.read_bytes())
    assert tokenizer_of(tmp_path).vocab_size == 500


@pytest.mark.parametrize("index", [-1, 100])
def test_a_sentinel_out_of_range_is_refused(index: int) -> None:
    with pytest.raises(moezoo.MoezooError, match="no such sentinel"):
        tokenizer().sentinel(index)
