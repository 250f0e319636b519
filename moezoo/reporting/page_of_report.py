"""The page of a report: its style and its program from `assets/`, its data as JSON, in one file."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from functools import cache
from html import escape
from pathlib import Path
from typing import Any

_ASSETS = Path(__file__).parent / "assets"
# In the order in which they need each other; each is a part of one function.
PROGRAM = (
    "elements", "packed", "model", "state", "figure", "text", "loads", "expert", "capacity",
    "flow", "lines", "run", "pair", "live", "head", "main",
)  # fmt: skip


def page_of(document: Mapping[str, Any], *, live: bool = False) -> str:
    """The whole page as text.

    Nothing but its own program may run in it and nothing may be fetched: its policy names both by
    their hashes, so that what a model's vocabulary holds stays text.

    Args:
        live: the page asks where it came from for newer data, once a second.
    """
    style, program = _style(), _program()
    policy = (
        f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(program)}; "
        f"connect-src {chr(39)}{'self' if live else 'none'}{chr(39)}; base-uri 'none'; "
        "form-action 'none'"
    )
    filled = {
        "policy": policy,
        "title": escape(str(document["title"])),
        "style": style,
        "data": data_of(document),
        "program": program,
    }
    page = _read("page.html")
    for name, value in filled.items():
        before, mark, after = page.partition(f"{{{{{name}}}}}")
        assert mark, name
        filled[name], page = before + value, after
    return "".join(filled.values()) + page


def data_of(document: Mapping[str, Any]) -> str:
    """A document as JSON that can stand inside a script element: no "<" is left that could end
    it.
    """
    text = json.dumps(document, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c")


@cache
def _program() -> str:
    parts = "\n".join(_read(f"{name}.js") for name in PROGRAM)
    return f'(() => {{\n"use strict";\n{parts}\n}})();'


@cache
def _style() -> str:
    return _read("page.css")


def _read(name: str) -> str:
    return (_ASSETS / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
