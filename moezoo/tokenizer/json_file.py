"""The tokenizer.json of transformers 5, run by the package tokenizers (the extra `hf`)."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from moezoo.errors import TokenizerError, how_to_install
from moezoo.tokenizer.base import BaseTokenizer, integers
from moezoo.tokenizer_files import TokenizerFacts, read_facts, read_file

NAME = "tokenizer.json"
_SPACE = "\u2581"


class JsonTokenizer(BaseTokenizer):
    """A tokenizer.json as it stands: ids equal those of transformers, which wrote it.

    Where there is a `spiece.model` as well, `Tokenizer` reads that: ids around sentinels then equal
    seqio's, which pre-training has seen. With eos, a text gets what the file's own template puts
    around it, and eos at its end in any case.

    Args:
        path: a tokenizer.json, or a directory that holds one; the small files beside it are read
            either way.

    Raises TokenizerError for a file that is missing or cannot be read, and without tokenizers.
    """

    def __init__(self, path: str | Path) -> None:
        file = Path(path).expanduser()
        file = file / NAME if file.is_dir() else file
        self._tokenizer: Any = _read(file)
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        facts = read_facts(file.parent) if file.name == NAME else TokenizerFacts()
        added = self._tokenizer.get_added_tokens_decoder()
        super().__init__(
            file,
            files=facts.files or {NAME: read_file(file)},
            pad_id=self._role(facts, "pad"),
            eos_id=self._role(facts, "eos"),
            sentinels=_sentinels(self._tokenizer),
            special=[number for number, token in added.items() if token.special],
        )
        self.unk_id = self._role(facts, "unk")
        size = int(self._tokenizer.get_vocab_size(with_added_tokens=False))
        self._vocab_size: int = max([size, *(number + 1 for number in added)])

    @property
    def vocab_size(self) -> int:
        """Tokens of the vocabulary and added ones."""
        return self._vocab_size

    def encode(self, text: str, *, eos: bool = True) -> list[int]:
        """Ids of a text, closed by eos."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=eos).ids
        return [*ids, self.eos_id] if eos and ids[-1:] != [self.eos_id] else ids

    def decode(self, ids: Iterable[int] | Tensor, *, skip_special: bool = True) -> str:
        """Text of ids; special tokens and sentinels are left out or, without skip_special,
        written.
        """
        hidden = self._hidden if skip_special else ()
        shown = [number for number in integers(ids) if number >= 0 and number not in hidden]
        return str(self._tokenizer.decode(shown, skip_special_tokens=False))

    def piece(self, number: int) -> str:
        """What one id stands for; a piece that begins a word begins with a low bar."""
        text = self._tokenizer.id_to_token(number) if number >= 0 else None
        return f"<{number}>" if text is None else str(text)

    def _role(self, facts: TokenizerFacts, role: str) -> int | None:
        """The id of a special token: by the name that the files give, else config.json's."""
        name = facts.roles.get(role)
        number = None if name is None else self._tokenizer.token_to_id(name)
        return facts.ids.get(role) if number is None else int(number)


def _sentinels(tokenizer: Any) -> list[int]:
    """The ids of `<extra_id_0>`, ..., added to the vocabulary or among its pieces (mT5)."""
    found: list[int] = []
    for index in itertools.count():
        name = f"<extra_id_{index}>"
        number = tokenizer.token_to_id(name)
        number = tokenizer.token_to_id(_SPACE + name) if number is None else number
        if number is None:
            return found
        found.append(int(number))
    return found


def _read(file: Path) -> Any:
    content = read_file(file)
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise TokenizerError(
            "a tokenizer.json is read by tokenizers, which is not installed",
            path=file,
            hint=f"{how_to_install('hf')}, or put the model's spiece.model beside it.",
        ) from None
    try:
        return Tokenizer.from_str(content.decode("utf-8"))
    except Exception as error:  # the package raises no class of its own
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise TokenizerError(f"no tokenizer.json: {reason}", path=file) from None
