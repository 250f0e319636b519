"""Flags of a verb from a TOML or JSON file; flags on the command line win over them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moezoo.errors import CorruptFile, did_you_mean


class FromFile(argparse.Action):
    """`--settings FILE`: flags by name, dashes or underscores alike; `set` may be a table.

    `settings_first` puts it before all other flags, so that those win.
    """

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        """Put the values of the file into the namespace."""
        known = {
            a.option_strings[0].lstrip("-").replace("-", "_"): a
            for a in parser._actions
            if a.option_strings and a.dest not in ("help", "debug", "settings")
        }
        try:
            found = settings_of(str(values))
        except CorruptFile as error:
            parser.error(str(error))
        for name, value in found.items():
            if name not in known:
                parser.error(f"{values}: unknown setting {name!r}; {did_you_mean(name, known)}")
            action = known[name]
            action.required = False
            setattr(namespace, action.dest, _typed(parser, action, name, value))
        setattr(namespace, self.dest, values)


def settings_first(words: Sequence[str]) -> list[str]:
    """The words with `--settings FILE` in front."""
    words = list(words)
    for index, word in enumerate(words):
        taken = 1 if word.startswith("--settings=") else 2 if word == "--settings" else 0
        if taken:
            return words[index : index + taken] + words[:index] + words[index + taken :]
    return words


def settings_of(path: str | Path) -> dict[str, Any]:
    """The values of a file by flag, with underscores. Raises CorruptFile."""
    import tomllib  # with datetime, which nothing else needs

    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        values = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except (OSError, ValueError) as error:
        raise CorruptFile(f"cannot be read as TOML or JSON: {error}", path=path) from None
    if not isinstance(values, dict):
        raise CorruptFile("holds no table of settings", path=path)
    return {str(name).replace("-", "_"): value for name, value in values.items()}


def as_written(text: str) -> Any:
    """The type of a flag whose value is JSON, or else the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _typed(parser: argparse.ArgumentParser, action: argparse.Action, name: str, value: Any) -> Any:
    """The value as the flag would have it; ends with a usage error for another kind."""
    if action.type is as_written:
        return value
    if isinstance(value, dict):
        value = [f"{key}={json.dumps(inner)}" for key, inner in value.items()]
    wants = "a list" if action.nargs == "*" else "true or false" if action.nargs == 0 else "a value"
    found = {list: "a list", bool: "true or false"}.get(type(value), "a value")
    if wants != found:
        parser.error(f"{name}: expected {wants}, found {value!r}")
    if wants != "a value":
        return value
    try:
        made = parser._get_value(action, str(value))
        parser._check_value(action, made)
    except argparse.ArgumentError as error:
        parser.error(f"{name}: {error.message}")
    return made
