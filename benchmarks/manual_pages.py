"""Manual pages as text that never repeats: one page a row of JSONL, markup taken out.

    apt-get download $(apt-cache search --names-only '^manpages' | cut -d" " -f1)   # on Debian
    for file in *.deb; do dpkg-deb -x $file pages; done
    rm -rf pages/usr/share/man/{ja,zh*}    # their characters alone would fill a small vocabulary
    python -m benchmarks.manual_pages pages manual_pages.jsonl

Pages that are links to others, too short, or word for word another page are left out, as are
those that are not UTF-8. The order is that of a fixed shuffle, so that a part of the file has every
language.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

SHORTEST = 400  # characters: less is a stub of a link
_COMMENT = re.compile(r"^[.']\s*\\\".*$|\\\".*$", re.MULTILINE)
_REQUEST = re.compile(r"^[.'][ \t]*([A-Za-z]*)[ \t]*(.*)$", re.MULTILINE)
_SHOWS = frozenset(
    "B I R BR RB BI IB IR RI SM SB SH SS TP IP Nm Fl Ar Op Xr Sh Ss Pa Em Li".split()
)
_FONT = re.compile(r"\\f(?:\[[^\]]*\]|\(..|.)|\\s[-+]?\d|\\[&,/|^%:]")
_NAMED = re.compile(r"\\(?:\[[^\]]*\]|\((..)|\*(?:\[[^\]]*\]|\(..|.))")
_SIGNS = {"em": "-", "en": "-", "hy": "-", "aq": "'", "dq": '"', "lq": '"', "rq": '"', "oq": "'",
          "cq": "'", "bu": "*", "co": "(c)", "ti": "~", "ha": "^", "ga": "`", "rs": "\\",
          }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="where packages were unpacked")
    parser.add_argument("out", type=Path, help="JSONL with a field `text`")
    options = parser.parse_args()
    count = characters = 0
    with options.out.open("w", encoding="utf-8") as file:
        for text in pages(options.folder):
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            count, characters = count + 1, characters + len(text)
    print(f"{count:,} pages, {characters:,} characters")


def pages(folder: Path) -> Iterator[str]:
    """The text of every page below a folder, each once."""
    paths = sorted(path for path in folder.rglob("*.gz") if not path.is_symlink())
    seen: set[str] = set()
    for path in sorted(paths, key=lambda path: _digest(str(path.relative_to(folder)))):
        try:
            text = plain(gzip.decompress(path.read_bytes()).decode("utf-8"))
        except UnicodeDecodeError:
            continue  # an old page in an encoding of its language
        digest = _digest(text)
        if len(text) >= SHORTEST and digest not in seen:
            seen.add(digest)
            yield text


def plain(source: str) -> str:
    """A page's words without groff's markup: what a request shows stays, what it sets goes."""
    text = _REQUEST.sub(_shown, _COMMENT.sub("", source))
    text = _NAMED.sub(lambda match: _SIGNS.get(match[1] or "", ""), _FONT.sub("", text))
    text = text.replace("\\-", "-").replace("\\e", "\\").replace("\\ ", " ").replace("\\(", "(")
    lines = (" ".join(line.split()) for line in text.splitlines())
    return "\n".join(line for line in lines if line)


def _shown(match: re.Match[str]) -> str:
    name, words = match[1], match[2].replace('"', "")
    return words if name in _SHOWS else ""


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


if __name__ == "__main__":
    main()
