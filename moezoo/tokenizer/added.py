"""Tokens that users added, found in text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from moezoo.tokenizer_files import AddedToken

# Noncharacters: code points that no text holds, which Unicode sets aside for marks like these.
_FIRST, _DIGITS, _LENGTH = 0xFDD0, 32, 5
_MARK = re.compile(f"[{chr(_FIRST)}-{chr(_FIRST + _DIGITS - 1)}]{{{_LENGTH}}}")


class AddedTokens:
    """Added tokens, matched in the text as it is written, the longest first.

    transformers matches those that are not special in normalised text, where a newline is a space
    and capitals of full width are plain ones.

    Args:
        whole: an expression for what no added token is found within.
    """

    def __init__(self, tokens: Iterable[AddedToken], *, whole: str | None = None) -> None:
        ordered = sorted(tokens, key=lambda token: (-len(token.text), token.number))
        # A search is fast over alternatives that begin with a letter: only flags make a group.
        self._flagged = [token for token in ordered if _has_flags(token)]
        parts = [] if whole is None else [whole]
        parts += [_expression(token) for token in ordered]
        self._pattern = re.compile("|".join(parts)) if ordered else None
        self._by_text = {token.text: token for token in ordered}
        self._by_number = {token.number: token for token in ordered}

    def __contains__(self, number: int) -> bool:
        return number in self._by_number

    def text(self, number: int) -> str:
        """The text of the token with an id."""
        return self._by_number[number].text

    def split(self, text: str) -> Iterator[str | AddedToken]:
        """The parts of a text that are no added token, and the added tokens, in order."""
        start = 0
        for match in self._pattern.finditer(text) if self._pattern else ():
            flagged = match.lastindex and self._flagged[match.lastindex - 1]
            token = flagged or self._by_text.get(match[0])
            if token is None:
                continue
            if match.start() > start:
                yield text[start : match.start()]
            yield token
            start = match.end()
        if start < len(text):
            yield text[start:]

    def marked(self, text: str) -> str:
        """The text with a mark in place of every added token."""
        parts = self.split(text)
        return "".join(part if isinstance(part, str) else mark(part.number) for part in parts)

    def unmarked(self, text: str) -> str:
        """The inverse of `marked`."""
        return _MARK.sub(lambda match: self.text(_number(match[0])), text)


def mark(number: int) -> str:
    """What stands for an id in a marked text: five noncharacters."""
    digits = [number // _DIGITS**place % _DIGITS for place in reversed(range(_LENGTH))]
    return "".join(chr(_FIRST + digit) for digit in digits)


def _number(text: str) -> int:
    number = 0
    for character in text:
        number = number * _DIGITS + ord(character) - _FIRST
    return number


def _has_flags(token: AddedToken) -> bool:
    return token.lstrip or token.rstrip or token.single_word


def _expression(token: AddedToken) -> str:
    """The token, in a capturing group where it has flags; white space is taken from where it
    begins, once.
    """
    if not _has_flags(token):
        return re.escape(token.text)
    before = r"(?:(?<!\s)\s++)?" if token.lstrip else ""
    after = r"\s*+" if token.rstrip else ""
    text = re.escape(token.text)
    whole = rf"(?<!\w){text}(?!\w)" if token.single_word else text
    return f"{before}({whole}){after}"
