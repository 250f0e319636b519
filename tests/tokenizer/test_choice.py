"""Which tokenizer a directory has, and which models it fits."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

import moezoo
from moezoo.tokenizer import fit, tokenizer_of
from tests.tokenizer.stand_ins import directory, families, other_model, t5_model

EXPECTED = {  # pad, eos, sentinels, the first one, mean span
    "mt5": (0, 1, 100, 499, 3.0),
    "umt5": (0, 1, 300, 699, 3.0),
    "byt5": (0, 1, 11, 258, 20.0),
    "madlad": (1, 2, 100, 439, 3.0),
    "pile": (0, 2, 100, 439, 3.0),
    "flan": (0, 1, 100, 499, 3.0),
}


def test_every_family_has_its_own_facts(tmp_path: Path) -> None:
    found = {}
    for name, path in families(tmp_path).items():
        ours = tokenizer_of(path)
        facts = (ours.pad_id, ours.eos_id, ours.num_sentinels, ours.sentinel(0), ours.mean_span)
        found[name] = facts
        assert ours.encode("every object")[-1] == ours.eos_id
    assert found == EXPECTED


def test_a_file_or_the_word_bytes_names_one(tmp_path: Path) -> None:
    directory(tmp_path, model=t5_model(), tokenizer_config={"extra_ids": 7})
    assert tokenizer_of(tmp_path / "spiece.model").vocab_size == 407
    assert isinstance(tokenizer_of("bytes"), moezoo.ByteTokenizer)


def test_a_directory_without_one_says_what_to_do(tmp_path: Path) -> None:
    directory(tmp_path, tokenizer_config={"tokenizer_class": "RobertaTokenizer"})
    with pytest.raises(moezoo.MoezooError, match=r"spiece\.model or tokenizer\.json") as caught:
        tokenizer_of(tmp_path)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("size", [383, 384, 512])
def test_more_ids_than_embeddings_are_refused_with_both_numbers(size: int) -> None:
    config = moezoo.SwitchConfig(vocab_size=size)
    if size >= 384:
        fit(moezoo.ByteTokenizer(), config)
        return
    with pytest.raises(moezoo.MoezooError, match="at most 383, found 384"):
        fit(moezoo.ByteTokenizer(), config)


def test_an_eos_that_is_not_the_model_s_is_refused(tmp_path: Path) -> None:
    ours = moezoo.Tokenizer(directory(tmp_path, model=other_model(unk=0, pad=1, eos=2, bos=-1)))
    with pytest.raises(moezoo.MoezooError, match=r"eos_token_id; expected 2, found 1"):
        fit(ours, moezoo.SwitchConfig(pad_token_id=1))
    fit(ours, moezoo.SwitchConfig(pad_token_id=1, eos_token_id=2))


def test_another_padding_is_warned_of_and_the_model_s_is_left_out_of_text(tmp_path: Path) -> None:
    ours = moezoo.Tokenizer(directory(tmp_path, model=other_model(unk=0, pad=1, eos=2, bos=-1)))
    with pytest.warns(UserWarning, match="pads with 1, the model with 0"):
        fit(ours, moezoo.SwitchConfig(eos_token_id=2))
    assert ours.decode([*ours.encode("every"), 0, 0]) == "every"


def test_the_model_says_what_no_file_of_the_tokenizer_does(tmp_path: Path) -> None:
    ours = moezoo.Tokenizer(directory(tmp_path, model=other_model(unk=0, bos=1, eos=2, pad=-1)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(ours, moezoo.SwitchConfig(pad_token_id=5, eos_token_id=2))
    assert ours.batch(["every", "every object"]).input_ids[0, -1] == 5
