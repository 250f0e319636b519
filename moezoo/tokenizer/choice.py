"""Which tokenizer a directory has, and whether it fits a model."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from moezoo.config import SwitchConfig
from moezoo.errors import ConfigError, TokenizerError
from moezoo.tokenizer.base import BaseTokenizer
from moezoo.tokenizer.byte_level import ByteTokenizer
from moezoo.tokenizer.json_file import NAME, JsonTokenizer
from moezoo.tokenizer.sentence_pieces import Tokenizer
from moezoo.tokenizer_files import MODEL_FILES, read_class

BYTES = "bytes"  # in place of a path


def tokenizer_of(source: str | Path) -> BaseTokenizer:
    """The tokenizer of a checkpoint directory: bytes where its class is ByT5's, else its
    sentencepiece model, else its tokenizer.json. A file, or the word "bytes", names one as well.

    Raises TokenizerError.
    """
    path = Path(source).expanduser()
    if not path.is_dir():
        if str(source) == BYTES and not path.exists():
            return ByteTokenizer()
        return JsonTokenizer(path) if path.suffix == ".json" else Tokenizer(path)
    kind = read_class(path)
    if kind is not None and kind.startswith("ByT5Tokenizer"):
        return ByteTokenizer(path)
    if any((path / name).is_file() for name in MODEL_FILES):
        return Tokenizer(path)
    if (path / NAME).is_file():
        return JsonTokenizer(path)
    raise TokenizerError(
        "no tokenizer here",
        path=path,
        expected="spiece.model or tokenizer.json",
        hint="Put one there (save_pretrained of transformers 5 writes it), or name another; bytes "
        "is ByT5's.",
    )


def fitting_tokenizer(source: str | Path, config: SwitchConfig) -> BaseTokenizer:
    """The tokenizer of a directory, fit for a model. Raises TokenizerError or ConfigError."""
    tokenizer = tokenizer_of(source)
    fit(tokenizer, config)
    return tokenizer


def fit(tokenizer: BaseTokenizer, config: SwitchConfig) -> None:
    """Hold a tokenizer to a model's config, which also says the special ids that no file names.

    Raises ConfigError for more ids than the model has embeddings, and for an eos that is not one of
    the model's: generation would never end. Another padding is warned of: what stands under
    padding is masked, and the model's own fills up what it generates.
    """
    if config.vocab_size < tokenizer.vocab_size:
        raise ConfigError(
            "the tokenizer has more ids than the model has embeddings",
            field="tokenizer",
            expected=f"at most {config.vocab_size}",
            found=tokenizer.vocab_size,
            hint="Resize them (`moezoo export --vocab-size`); extra_ids in tokenizer_config.json "
            "counts the sentinels.",
        )
    eos: Any = config.eos_token_id
    ends = [eos] if isinstance(eos, int) else list(eos)
    tokenizer.adopt(pad_id=config.pad_token_id, eos_id=ends[0])
    if tokenizer.eos_id not in ends:
        raise ConfigError(
            "the tokenizer closes texts with another id than the model's eos_token_id",
            field="eos_token_id",
            expected=tokenizer.eos_id,
            found=eos,
            hint="Correct config.json or the tokenizer's files, or name another tokenizer.",
        )
    if tokenizer.pad_id != config.pad_token_id:
        warnings.warn(
            f"the tokenizer pads with {tokenizer.pad_id}, the model with {config.pad_token_id}",
            stacklevel=3,
        )
