"""Small directories with the tokenizer files of the family's models."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import sentencepiece

from moezoo.tokenizer.spiece_model import USER_DEFINED, with_pieces
from tests.training.text import tokenizer

SPACE = "\u2581"
PIECES = 400


@cache
def t5_model() -> bytes:
    """400 pieces; pad 0, eos 1, unk 2."""
    path = tokenizer().path
    assert path is not None
    return path.read_bytes()


@cache
def mt5_model() -> bytes:
    """The same with 100 sentinels at its end, as mT5 has them."""
    inside = {PIECES + i: (f"{SPACE}<extra_id_{99 - i}>", USER_DEFINED) for i in range(100)}
    return with_pieces(t5_model(), inside, Path("spiece.model"))


@cache
def other_model(**ids: int) -> bytes:
    """200 pieces with other special ids, byte pairs with a fallback to bytes as Llama has."""
    prefix = Path(mkdtemp()) / "other"
    lines = [f"every object {i} has a type and a value of its own" for i in range(300)]
    options: dict[str, Any] = {f"{role}_id": number for role, number in ids.items()}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines * 2),
        model_prefix=str(prefix),
        vocab_size=340,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
        hard_vocab_limit=False,
        **options,
    )
    return prefix.with_suffix(".model").read_bytes()


def directory(path: Path, *, model: bytes | None = None, **files: Any) -> Path:
    """A directory with a spiece.model and JSON files; `a_b` names a_b.json."""
    path.mkdir(parents=True, exist_ok=True)
    if model is not None:
        (path / "spiece.model").write_bytes(model)
    for name, values in files.items():
        (path / f"{name}.json").write_text(json.dumps(values))
    return path


def families(path: Path) -> dict[str, Path]:
    """A directory per family, by its name."""
    madlad = other_model(unk=0, pad=1, eos=2, bos=-1)
    pile = other_model(unk=0, bos=1, eos=2, pad=-1)
    names = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    t5 = {"tokenizer_class": "T5Tokenizer", **names}
    llama = {"tokenizer_class": "LlamaTokenizer", "eos_token": "</s>", "bos_token": "<s>"}
    found = {
        "mt5": directory(path / "mt5", model=mt5_model(), tokenizer_config=t5 | {"extra_ids": 0}),
        "umt5": directory(
            path / "umt5", model=t5_model(), tokenizer_config=t5 | {"extra_ids": 300}
        ),
        "byt5": directory(path / "byt5", tokenizer_config={"tokenizer_class": "ByT5Tokenizer"}),
        "madlad": directory(path / "madlad", model=madlad, special_tokens_map=names),
        "pile": directory(path / "pile", tokenizer_config=llama, config={"pad_token_id": 0}),
        "flan": directory(
            path / "flan", model=t5_model(), tokenizer_config=t5 | {"extra_ids": 100}
        ),
    }
    (found["pile"] / "tokenizer.model").write_bytes(pile)
    return found
