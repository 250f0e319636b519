"""Pieces of a vocabulary as people read them."""

from __future__ import annotations

import unicodedata

LONGEST = 40  # characters of a piece that a page shows
_LOW_BAR = "\u2581"  # how sentencepiece writes a space
_NAMED = {"\n": "\u21b5", "\r": "\u21b5", "\t": "\u21e5"}
# Joiners shape the letters of some scripts, and variation selectors emoji.
_KEPT = {"\u200c", "\u200d", *map(chr, range(0xFE00, 0xFE10)), *map(chr, range(0xE0020, 0xE0080))}


def readable(piece: str) -> str:
    """A piece as a page shows it: spaces for low bars, a sign for each control character, and no
    more than `LONGEST` characters.
    """
    shown = piece.replace(_LOW_BAR, " ")
    if len(shown) > LONGEST:
        shown = shown[: LONGEST - 1] + "\u2026"
    return "".join(map(_sign, shown))


def _sign(character: str) -> str:
    if character in _NAMED:
        return _NAMED[character]
    # Controls, overrides of the direction of writing and halves of a pair would not be seen, or
    # would change how their neighbours look.
    if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp"):
        return character if character in _KEPT else f"<{ord(character):04X}>"
    return character
