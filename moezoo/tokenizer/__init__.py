"""Tokenizers of the T5 family: sentencepiece, bytes (ByT5), and the tokenizer.json of transformers.

Everything about one comes from its files; which files, and what they decide: docs/tokenizers.md.
"""

from __future__ import annotations

from moezoo.tokenizer.base import BaseTokenizer, Batch, padded, truncated
from moezoo.tokenizer.byte_level import ByteTokenizer
from moezoo.tokenizer.choice import fit, fitting_tokenizer, tokenizer_of
from moezoo.tokenizer.sentence_pieces import T5_SENTINELS, Tokenizer

__all__ = [
    "T5_SENTINELS",
    "BaseTokenizer",
    "Batch",
    "ByteTokenizer",
    "Tokenizer",
    "fit",
    "fitting_tokenizer",
    "padded",
    "tokenizer_of",
    "truncated",
]
