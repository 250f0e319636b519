"""ByT5's tokenizer: bytes, the extra tokens of its files, and the sentinels of pre-training."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import moezoo
from moezoo.tokenizer import tokenizer_of
from tests.tokenizer.stand_ins import directory

TEXTS = ["Hello world", "The <extra_id_0> walks", "<extra_id_124>x", "x<extra_id_5>y", " a  b ", ""]


def test_ids_equal_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    ours, theirs = moezoo.ByteTokenizer(), transformers.ByT5Tokenizer()
    assert ours.vocab_size == len(theirs) == 384
    for text in [*TEXTS, "ünï©ödé 漢字", "no <extra_id_125> sentinel", "\0tab\tnew\nline"]:
        assert ours.encode(text) == theirs(text).input_ids, text


def test_a_directory_saved_by_transformers_keeps_its_tokens(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.ByT5Tokenizer()
    theirs.add_tokens(["<ctx>", "\n\n"])
    theirs.save_pretrained(tmp_path)
    ours = tokenizer_of(tmp_path)
    assert isinstance(ours, moezoo.ByteTokenizer)
    assert ours.vocab_size == len(theirs) == 386
    for text in [*TEXTS, "a<ctx>b", "a\n\nb"]:
        assert ours.encode(text) == theirs(text).input_ids, text
        assert ours.decode(ours.encode(text), skip_special=False) == text + "</s>"


def test_sentinels_are_those_of_pre_training_and_no_byte_of_text() -> None:
    ours = moezoo.ByteTokenizer()
    assert [ours.sentinel(i) for i in range(ours.num_sentinels)] == list(range(258, 247, -1))
    assert ours.mean_span == 20.0
    every = "".join(map(chr, [*range(0x3000), *range(0xE000, 0x110000, 97)]))
    assert max(ours.encode(every, eos=False)) < ours.sentinel(ours.num_sentinels - 1)
    assert ours.decode([258, *ours.encode("a")]) == "a"
    assert ours.decode([258, *ours.encode("a")], skip_special=False) == "<extra_id_0>a</s>"


@pytest.mark.parametrize("text", ["<extra_id_00>", "<extra_id_\u0661>", "</s>", "<pad>"])
def test_what_is_no_extra_token_is_bytes(text: str) -> None:
    ours = moezoo.ByteTokenizer()
    assert ours.encode(text, eos=False) == [byte + 3 for byte in text.encode()]


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_bytes_round_trip(text: str) -> None:
    ours = moezoo.ByteTokenizer()
    if "<extra_id_" not in text:
        assert ours.decode(ours.encode(text)) == text


def test_a_long_decoding_copies_no_prefix_again() -> None:
    ours = moezoo.ByteTokenizer()
    tracemalloc.start()
    assert len(ours.decode([100] * 200_000)) == 200_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 * 200_000, "one buffer that grows, not a new one per byte"


@pytest.mark.parametrize(
    ("files", "size"),
    [
        ({"tokenizer_config": {"tokenizer_class": "ByT5Tokenizer", "extra_ids": 0}}, 259),
        ({"tokenizer_config": {"tokenizer_class": "ByT5Tokenizer", "extra_ids": 7}}, 266),
        ({"tokenizer_config": {"tokenizer_class": "ByT5Tokenizer"}}, 384),
        ({"config": {"tokenizer_class": "ByT5Tokenizer"}}, 384),
        (
            {
                "tokenizer_config": {"tokenizer_class": "ByT5Tokenizer"},
                "added_tokens": {"<ctx>": 384},
            },
            385,
        ),
    ],
)
def test_the_files_say_how_many_extra_tokens_there_are(
    files: dict[str, object], size: int, tmp_path: Path
) -> None:
    ours = tokenizer_of(directory(tmp_path, **files))
    assert ours.vocab_size == size
    (tmp_path / "again").mkdir()
    ours.save(tmp_path / "again")
    again = tokenizer_of(tmp_path / "again")
    assert again.vocab_size == size
    if size == 385:
        assert ours.encode("a<ctx>") == again.encode("a<ctx>") == [100, 384, 1]
        assert json.loads((tmp_path / "again/added_tokens.json").read_text()) == {"<ctx>": 384}
