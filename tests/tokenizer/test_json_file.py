"""What transformers 5 saves: a tokenizer.json, and no spiece.model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

import moezoo
from moezoo.tokenizer import tokenizer_of
from tests.real_files import unpacked
from tests.tokenizer.stand_ins import directory, mt5_model, t5_model

TEXTS = ["Hello world", "a <ctx> b<ctx>", "x<extra_id_5>y", "<extra_id_0>.", "a</s>b", "", "{ö}"]


def saved(path: Path, model: bytes, extra_ids: int) -> Any:
    """A tokenizer of transformers with two tokens of a user's, saved by it."""
    transformers = pytest.importorskip("transformers")
    settings = {"tokenizer_class": "T5Tokenizer", "extra_ids": extra_ids}
    source = directory(path / "source", model=model, tokenizer_config=settings)
    theirs = transformers.T5Tokenizer.from_pretrained(source, extra_ids=extra_ids)
    theirs.add_tokens(["<ctx>"])
    theirs.add_special_tokens({"additional_special_tokens": ["<sep>"]})
    theirs.save_pretrained(path / "saved")
    assert not (path / "saved/spiece.model").exists()
    return theirs


@pytest.mark.parametrize(("model", "extra_ids"), [(t5_model, 100), (mt5_model, 0)])
def test_ids_and_text_equal_transformers(model: Any, extra_ids: int, tmp_path: Path) -> None:
    theirs = saved(tmp_path, model(), extra_ids)
    ours = tokenizer_of(tmp_path / "saved")
    assert ours.vocab_size == len(theirs) == 502
    for text in TEXTS:
        ids = theirs(text).input_ids
        assert ours.encode(text) == ids, text
        assert ours.encode(text, eos=False) == theirs(text, add_special_tokens=False).input_ids
    assert (ours.pad_id, ours.eos_id) == (0, 1)
    assert (ours.num_sentinels, ours.sentinel(0), ours.sentinel(99)) == (100, 499, 400)
    ids = ours.encode("the <ctx> type<sep>")
    assert {500, 501} <= set(ids)
    assert ours.decode([*ids, 0]) == theirs.decode([*ids, 0], skip_special_tokens=True)
    assert "<ctx>" in ours.decode(ids)
    assert ours.decode([*ids, 0], skip_special=False).endswith("<sep></s><pad>")
    assert (ours.piece(500), ours.piece(9999)) == ("<ctx>", "<9999>")


def test_it_is_saved_as_it_was_read_and_files_name_it_too(tmp_path: Path) -> None:
    saved(tmp_path, t5_model(), 100)
    ours = tokenizer_of(tmp_path / "saved/tokenizer.json")
    (tmp_path / "again").mkdir()
    ours.save(tmp_path / "again")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "saved" / name).read_bytes()


def test_truncation_and_padding_in_the_file_cut_nothing(tmp_path: Path) -> None:
    saved(tmp_path, t5_model(), 100)
    from tokenizers import Tokenizer

    file = tmp_path / "saved/tokenizer.json"
    changed = Tokenizer.from_file(str(file))
    whole = len(tokenizer_of(file).encode("the object has a type"))
    changed.enable_truncation(3)
    changed.enable_padding(length=50)
    changed.save(str(file))
    assert len(tokenizer_of(file).encode("the object has a type")) == whole > 3


def test_added_tokens_are_read_from_it_beside_a_sentencepiece_model(tmp_path: Path) -> None:
    saved(tmp_path, t5_model(), 100)
    (tmp_path / "saved/spiece.model").write_bytes(t5_model())
    ours = tokenizer_of(tmp_path / "saved")
    assert isinstance(ours, moezoo.Tokenizer)
    assert (ours.vocab_size, ours.sentinel(0)) == (502, 499)
    assert ours.decode(ours.encode("a <ctx> b<sep>")) == "a <ctx> b"


def test_without_tokenizers_the_error_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(moezoo.MoezooError, match=r"pip install '\.\[hf\]'"):
        tokenizer_of(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{}", b"<html>", b"[1]", b"\xff\xfe"])
def test_a_bad_file_is_refused_by_name(content: bytes, tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(moezoo.MoezooError, match=r"tokenizer\.json"):
        tokenizer_of(tmp_path)


def test_the_real_one_of_t5(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    source = unpacked("t5", tmp_path / "t5")
    theirs = transformers.T5Tokenizer.from_pretrained(source)
    theirs.save_pretrained(tmp_path / "saved")
    ours, whole = tokenizer_of(tmp_path / "saved"), tokenizer_of(source)
    assert ours.vocab_size == whole.vocab_size == 32100
    assert ours.sentinel(0) == whole.sentinel(0) == 32099
    for text in ("Hello <extra_id_0> world", "ünï©ödé"):
        assert ours.encode(text) == whole.encode(text) == theirs(text).input_ids
