"""T5's tokenizer: what its files say is what it does."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import moezoo
from moezoo.tokenizer import tokenizer_of
from tests.real_files import real, unpacked
from tests.tokenizer.stand_ins import (
    PIECES,
    directory,
    mt5_model,
    other_model,
    t5_model,
)
from tests.training.text import tokenizer

NO_SENTINELS = ["<extra_id_00>", "<extra_id_\u0661>", f"<extra_id_{'9' * 5000}>", "<extra_id_100>"]
WORDS = "the cat sat on a mat and every object has type".split()


def added(tokens: dict[str, int], **flags: Any) -> dict[str, Any]:
    return {str(number): {"content": text, **flags} for text, number in tokens.items()}


@pytest.mark.parametrize("family", ["t5", "mt5"])
def test_ids_equal_seqio_on_every_text(family: str, tmp_path: Path) -> None:
    ours = moezoo.Tokenizer(unpacked(family, tmp_path / family))
    texts = json.loads(real("tokenizer/seqio_ids.json").read_text())
    assert len(texts) > 1000
    assert [row for row in texts if ours.encode(row["text"]) != row[family]] == []


def test_a_sentinel_begins_a_word_and_puts_nothing_before_what_follows() -> None:
    ours = tokenizer()
    dot = ours.encode("a.", eos=False)[-1]
    assert ours.encode("<extra_id_0>.") == [ours.sentinel(0), dot, 1]
    assert ours.sentinel(5) not in ours.encode("x<extra_id_5>y")
    assert ours.encode("a <extra_id_0> <extra_id_1>").count(ours.sentinel(1)) == 1


def test_ids_of_plain_text_equal_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    directory(tmp_path, model=t5_model(), config={"model_type": "t5"})
    ours, theirs = tokenizer(), transformers.T5Tokenizer.from_pretrained(tmp_path)
    assert ours.vocab_size == len(theirs) == 500
    texts = ["Hello world", "a  b   c", " lead and tail ", "tab\tnew\nline", "ünï©ödé 漢字", ""]
    for text in [*texts, "The <extra_id_0> walks in <extra_id_1> park", "<extra_id_99>"]:
        assert ours.encode(text) == theirs(text).input_ids, text
    for index in (0, 7, 99):
        assert ours.sentinel(index) == theirs.convert_tokens_to_ids(f"<extra_id_{index}>")


@pytest.mark.parametrize("text", NO_SENTINELS)
def test_what_only_looks_like_a_sentinel_is_text(text: str) -> None:
    ids = tokenizer().encode(text)
    assert max(ids) < PIECES
    assert len(ids) > 3


@pytest.mark.parametrize("text", ["</s>", "a</s>", "<pad>", "<unk>"])
def test_special_tokens_written_in_text_are_text(text: str) -> None:
    ids = tokenizer().encode(text, eos=False)
    assert not {0, 1} & set(ids)


def test_sentinels_inside_the_vocabulary_are_found_there(tmp_path: Path) -> None:
    for settings in ({}, {"tokenizer_config": {"extra_ids": 0}}):
        ours = moezoo.Tokenizer(directory(tmp_path, model=mt5_model(), **settings))
        assert (ours.vocab_size, ours.num_sentinels, ours.sentinel(0)) == (500, 100, 499)
        assert ours.encode("a <extra_id_99>.") == [*ours.encode("a", eos=False), 400, *dot(ours), 1]


def dot(ours: moezoo.Tokenizer) -> list[int]:
    return ours.encode("a.", eos=False)[-1:]


@pytest.mark.parametrize(
    ("files", "number"),
    [
        ({}, 100),
        ({"tokenizer_config": {"extra_ids": 300}}, 300),
        ({"tokenizer_config": {"extra_ids": 0}}, 0),
        ({"special_tokens_map": {"additional_special_tokens": ["<extra_id_0>", "<x>"]}}, 1),
        ({"config": {"vocab_size": PIECES}}, 0),
        ({"config": {"vocab_size": PIECES + 128}}, 100),
        ({"added_tokens": {"<x>": PIECES}}, 0),
        ({"added_tokens": {"<x>": PIECES + 100}}, 100),
    ],
)
def test_the_files_say_how_many_sentinels_there_are(
    files: dict[str, Any], number: int, tmp_path: Path
) -> None:
    ours = moezoo.Tokenizer(directory(tmp_path, model=t5_model(), **files))
    assert ours.num_sentinels == number
    for index in range(number):
        assert ours.sentinel(index) == PIECES + number - 1 - index
        assert ours.encode(f"a <extra_id_{index}>", eos=False)[-1] == ours.sentinel(index)


def test_listed_sentinels_stand_where_they_are_listed(tmp_path: Path) -> None:
    places = {f"<extra_id_{i}>": PIECES + 7 + i for i in range(5)}
    files = {"tokenizer_config": {"extra_ids": 5, "added_tokens_decoder": added(places)}}
    ours = moezoo.Tokenizer(directory(tmp_path, model=t5_model(), **files))
    assert [ours.sentinel(i) for i in range(5)] == list(range(407, 412))
    assert ours.vocab_size == 412, "ids that nobody has are none"
    assert ours.encode("a <extra_id_2>", eos=False)[-1] == 409


@pytest.mark.parametrize(
    ("ids", "names"),
    [
        ({"unk": 0, "pad": 1, "eos": 2, "bos": -1}, {}),
        ({"unk": 0, "bos": 1, "eos": 2, "pad": -1}, {"pad_token": "<s>"}),
        ({"unk": 0, "bos": 1, "eos": 2, "pad": -1}, {"pad_token": {"content": "<s>"}}),
    ],
)
def test_special_ids_are_those_of_the_model_or_its_settings(
    ids: dict[str, int], names: dict[str, Any], tmp_path: Path
) -> None:
    model = other_model(**ids)
    ours = moezoo.Tokenizer(directory(tmp_path, model=model, tokenizer_config=names))
    assert (ours.pad_id, ours.eos_id) == (1, 2)
    assert ours.encode("every object")[-1] == 2
    batch = ours.batch(["every", "every object has a type"])
    assert set(batch.input_ids[batch.attention_mask == 0].tolist()) == {1}
    assert ours.decode([*ours.encode("every object"), 1, 1]) == "every object"
    assert ours.decode([1, 2], skip_special=False).endswith("</s>")


def test_a_missing_padding_is_config_json_s_or_refused_when_it_is_needed(tmp_path: Path) -> None:
    model = other_model(unk=0, bos=1, eos=2, pad=-1)
    ours = moezoo.Tokenizer(directory(tmp_path, model=model))
    assert ours.encode("every")[-1] == 2
    with pytest.raises(moezoo.MoezooError, match="no file names the pad token"):
        ours.batch(["every"])
    ours = moezoo.Tokenizer(directory(tmp_path, config={"pad_token_id": 0}))
    assert ours.pad_id == 0
    assert ours.decode([*ours.encode("every"), 0, 0]) == "every", "padding, though it is <unk>"


def test_an_eos_that_is_no_piece_is_refused(tmp_path: Path) -> None:
    directory(tmp_path, model=t5_model(), tokenizer_config={"eos_token": "<|end|>"})
    with pytest.raises(moezoo.MoezooError, match=r"the eos token '<\|end\|>'"):
        moezoo.Tokenizer(tmp_path)


def test_bos_is_put_before_a_text_where_the_settings_say_so(tmp_path: Path) -> None:
    model = other_model(unk=0, bos=1, eos=2, pad=-1)
    for said in (False, True):
        ours = moezoo.Tokenizer(
            directory(tmp_path, model=model, tokenizer_config={"add_bos_token": said})
        )
        assert ours.encode("every")[0] == 1 if said else ours.encode("every")[0] > 2
        assert ours.encode("every", eos=False) == ours.encode("every")[said:-1]


TOKENS = ["<ctx>", "\n", "{", "newword", "two words", "    ", "\ttab", "<ctx>>", "ﬁ", "e"]


def added_files(kind: str, first: int) -> dict[str, Any]:
    ids = {text: first + i for i, text in enumerate(TOKENS)}
    if kind == "added_tokens":
        return {"added_tokens": ids}
    if kind == "tokenizer":
        rows = [{"id": number, "content": text} for text, number in ids.items()]
        return {"tokenizer": {"added_tokens": rows}}
    return {"tokenizer_config": {"added_tokens_decoder": added(ids)}}


@pytest.mark.parametrize("kind", ["added_tokens", "added_tokens_decoder", "tokenizer"])
@pytest.mark.parametrize("model", [t5_model, mt5_model])
def test_added_tokens_encode_and_decode_as_themselves(
    kind: str, model: Any, tmp_path: Path
) -> None:
    ours = moezoo.Tokenizer(directory(tmp_path, model=model(), **added_files(kind, 500)))
    assert (ours.vocab_size, ours.num_sentinels) == (500 + len(TOKENS), 100)
    for number, token in enumerate(TOKENS, 500):
        apart = [f"on {token} mat"] if token.strip() else []  # spaces in a row are one
        for text in (f"on{token}mat", token, *apart):
            ids = ours.encode(text)
            assert ids.count(number) == 1, text
            assert ours.decode(ids) == text
        assert ours.piece(number) == token
    assert ours.encode("on <extra_id_3>{")[-3:] == [ours.sentinel(3), 502, 1]


@cache
def with_tokens() -> moezoo.Tokenizer:
    files = added_files("added_tokens", 500)
    return moezoo.Tokenizer(directory(Path(mkdtemp()), model=t5_model(), **files))


@given(st.lists(st.sampled_from([*WORDS, "<ctx>", "{", "newword", "two words", "<ctx>>"])))
def test_words_and_added_tokens_round_trip(words: list[str]) -> None:
    ours, text = with_tokens(), " ".join(words)
    ids = ours.encode(text)
    assert ours.decode(ids) == text
    expected = [500 + TOKENS.index(word) for word in words if word in TOKENS]
    assert [n for n in ids if n >= 500 and n != 500 + TOKENS.index("e")] == expected


def test_flags_of_added_tokens_hold(tmp_path: Path) -> None:
    flags = {
        "500": {"content": "<mask>", "lstrip": True, "special": True},
        "501": {"content": "<tail>", "rstrip": True},
        "502": {"content": "cat", "single_word": True},
    }
    files = {"tokenizer_config": {"added_tokens_decoder": flags, "extra_ids": 100}}
    ours = moezoo.Tokenizer(directory(tmp_path, model=t5_model(), **files))
    assert ours.encode("on   <mask>") == ours.encode("on<mask>")
    assert ours.encode("<tail> \n on") == ours.encode("<tail>on")
    assert 502 in ours.encode("a cat.")
    assert 502 not in ours.encode("cats concat")
    assert ours.decode(ours.encode("on <mask> mat <tail>")) == "on mat <tail>"
    assert "<mask>" in ours.decode(ours.encode("on <mask>"), skip_special=False)


def test_a_long_run_of_spaces_costs_no_more_than_its_length(tmp_path: Path) -> None:
    files = {
        "tokenizer_config": {"added_tokens_decoder": {"500": {"content": "x", "lstrip": True}}}
    }
    ours = moezoo.Tokenizer(directory(tmp_path, model=t5_model(), **files))
    assert ours.encode(" " * 300_000 + "a") == ours.encode("a")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"added_tokens": {"<a>": 5}}, "the id 5 has two tokens"),
        ({"added_tokens": {"<extra_id_0>": 5}}, "the id 5 has two tokens"),
        ({"added_tokens": {"<a>": 500, "<b>": 500}}, "the id 500 has two tokens"),
        ({"added_tokens": {"<a>": 450}, "tokenizer_config": {"extra_ids": 100}}, "the id 450"),
        ({"added_tokens": {"<a>": "x"}}, "no text or no id"),
        ({"added_tokens": {"<a>": 10**9}}, "no text or no id"),
        ({"added_tokens": ["<a>"]}, "no JSON object"),
        ({"tokenizer_config": {"added_tokens_decoder": ["<a>"]}}, "added_tokens_decoder"),
        ({"tokenizer_config": {"extra_ids": -1}}, "extra_ids"),
        ({"tokenizer_config": {"extra_ids": "100"}}, "extra_ids"),
        (
            {
                "added_tokens": {"<a>": 500},
                "tokenizer_config": {"added_tokens_decoder": added({"<a>": 501})},
            },
            "different ids",
        ),
    ],
)
def test_files_that_contradict_are_refused_by_name(
    files: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(moezoo.MoezooError, match=message) as caught:
        moezoo.Tokenizer(directory(tmp_path, model=t5_model(), **files))
    assert str(tmp_path) in str(caught.value)
    assert len(str(caught.value)) < 300


@given(st.lists(st.sampled_from(WORDS)))
def test_words_round_trip(words: list[str]) -> None:
    ours = tokenizer()
    assert ours.decode(ours.encode(" ".join(words))) == " ".join(words)


def test_special_tokens_are_shown_on_request() -> None:
    ours = tokenizer()
    ids = ours.encode("a <extra_id_3> b")
    assert "<extra_id_3>" in ours.decode(ids, skip_special=False)
    assert ours.decode(ids) == "a b"
    assert ours.decode([0, *ids, 0], skip_special=False).startswith("<pad>")
    assert ours.decode([700], skip_special=False) == "<700>"


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
    path, good = tmp_path / "spiece.model", t5_model()
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


def test_training_is_reproducible_and_takes_special_ids(tmp_path: Path) -> None:
    lines = [f"every object {i} has a type and a value" for i in range(200)]
    paths = [tmp_path / "one.model", tmp_path / "two.model"]
    made = [
        moezoo.Tokenizer.train(lines, path, vocab_size=45, pad_id=1, eos_id=2) for path in paths
    ]
    text = "every type has a value"
    assert made[0].encode(text) == made[1].encode(text) == moezoo.Tokenizer(paths[0]).encode(text)
    assert (made[0].pad_id, made[0].eos_id, made[0].encode(text)[-1]) == (1, 2, 2)


@pytest.mark.parametrize("index", [-1, 100])
def test_a_sentinel_out_of_range_is_refused(index: int) -> None:
    with pytest.raises(moezoo.MoezooError, match="no such sentinel"):
        tokenizer().sentinel(index)


def test_a_number_of_sentinels_can_be_given_and_is_saved(tmp_path: Path) -> None:
    file = tmp_path / "any.model"
    file.write_bytes(t5_model())
    ours = moezoo.Tokenizer(file, num_sentinels=7)
    (tmp_path / "saved").mkdir()
    ours.save(tmp_path / "saved")
    again = tokenizer_of(tmp_path / "saved")
    assert (again.num_sentinels, again.vocab_size, again.eos_id) == (7, PIECES + 7, 1)
    listed = {"added_tokens": {"<extra_id_0>": PIECES}}
    with pytest.raises(moezoo.MoezooError, match="num_sentinels"):
        moezoo.Tokenizer(directory(tmp_path / "saved", **listed), num_sentinels=7)
