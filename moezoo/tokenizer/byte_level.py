"""ByT5's tokenizer: bytes (arXiv 2105.13626)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from moezoo.tokenizer.added import AddedTokens
from moezoo.tokenizer.base import BaseTokenizer, integers, json_bytes
from moezoo.tokenizer_files import AddedToken, TokenizerFacts, read_facts

_SPECIAL = {0: "<pad>", 1: "</s>", 2: "<unk>"}
_FIRST, _LAST = 3, 258  # the ids of the bytes 0 and 255
_EXTRA_IDS = 125
_UNUSED_BYTES = range(0xF5, 0x100)  # in no UTF-8 text


class ByteTokenizer(BaseTokenizer):
    """A byte b is the id b + 3; pad 0, eos 1, unk 2.

    `sentinel(i)` is what ByT5's weights have seen in pre-training: 258, 257, ..., the ids of bytes
    that no text has, so there are 11 of them. `<extra_id_3>` written in text is 262, as in
    transformers, whose 125 extra tokens (259 upward) the published weights were never trained on.
    Special tokens written in text (`</s>`) are bytes, as in seqio; in transformers they are ids.

    Args:
        path: a directory whose files say how many extra tokens there are, and which were added.
    """

    mean_span = 20.0

    def __init__(self, path: str | Path | None = None) -> None:
        facts = TokenizerFacts() if path is None else read_facts(Path(path).expanduser())
        listed = [token for token in facts.added.values() if token.number > _LAST]
        count = _EXTRA_IDS if facts.extra_ids is None else facts.extra_ids
        if not facts.sentinels:
            taken = {token.number for token in listed}
            extra = {i: _LAST + 1 + i for i in range(count) if _LAST + 1 + i not in taken}
            listed += [AddedToken(f"<extra_id_{i}>", n, special=True) for i, n in extra.items()]
        self._added = AddedTokens(listed)
        self._vocab_size = 1 + max([_LAST, *(token.number for token in listed)])
        files = dict(facts.files)
        if "tokenizer_config.json" not in files:
            settings = {"tokenizer_class": "ByT5Tokenizer", "extra_ids": count}
            files["tokenizer_config.json"] = json_bytes(settings)
        super().__init__(
            None if path is None else Path(path),
            files=files,
            pad_id=0,
            eos_id=1,
            sentinels=[byte + _FIRST for byte in reversed(_UNUSED_BYTES)],
            special=[*_SPECIAL, *(token.number for token in listed if token.special)],
        )

    @property
    def vocab_size(self) -> int:
        """Special tokens, bytes, extra and added tokens."""
        return self._vocab_size

    def encode(self, text: str, *, eos: bool = True) -> list[int]:
        """Ids of a text's UTF-8 bytes; an added token is one id."""
        ids: list[int] = []
        for part in self._added.split(text):
            if isinstance(part, str):
                ids += [byte + _FIRST for byte in part.encode("utf-8")]
            else:
                ids.append(part.number)
        return [*ids, self.eos_id] if eos else ids

    def decode(self, ids: Iterable[int] | Tensor, *, skip_special: bool = True) -> str:
        """Text of ids; bytes that are no UTF-8 are left out."""
        content = bytearray()
        for number in integers(ids):
            if skip_special and number in self._hidden:
                continue
            if _FIRST <= number <= _LAST and number not in self._sentinels:
                content.append(number - _FIRST)
            elif number in self._added or not skip_special:
                content += self.piece(number).encode()
        return content.decode("utf-8", errors="ignore")

    def piece(self, number: int) -> str:
        """What one id stands for: a byte as ASCII shows it, else its escape."""
        if number in self._sentinels:
            return f"<extra_id_{self._sentinels.index(number)}>"
        if _FIRST <= number <= _LAST:
            return ascii(bytes([number - _FIRST]))[2:-1]
        if number in self._added:
            return self._added.text(number)
        return _SPECIAL.get(number, f"<{number}>")
