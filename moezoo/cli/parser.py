"""The grammar that all verbs share: options and words in any order, and OUT said in one way.

argparse alone takes a word after an option for a stranger (`generate M --num-beams 2 "text"`), and
lets a list swallow the words behind it (`train --text a.txt OUT`).
"""

from __future__ import annotations

import argparse
import difflib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from moezoo.cli.settings import settings_first

# What verbs call a checkpoint that they read.
_CHECKPOINTS = {"against", "checkpoint", "model", "source", "sources", "teacher"}


class Parser(argparse.ArgumentParser):
    """argparse with words and options in any order, and the nearest flag in its errors."""

    def error(self, message: str) -> NoReturn:
        unknown = [w.rstrip(":,") for w in message.split() if w.startswith("--")]
        flags = [flag for action in self._actions for flag in action.option_strings]
        near = [m for w in unknown for m in difflib.get_close_matches(w.split("=")[0], flags, n=1)]
        hint = f" Did you mean {near[0]}?" if near and near[0] not in unknown else ""
        self.exit(2, f"{self.prog}: {message.rstrip('.?')}.{hint} See `{self.prog} --help`.\n")

    def parsed(self, words: Sequence[str]) -> argparse.Namespace:
        """The arguments of a verb; ends with a usage error for what it does not take."""
        namespace = self.parse_intermixed_args(self._with_lists_cut(settings_first(words)))
        for dest in _CHECKPOINTS & vars(namespace).keys():
            setattr(namespace, dest, _model_of_run(getattr(namespace, dest)))
        for action in self._actions:
            if isinstance(action, _Output) and getattr(namespace, action.dest, None) is None:
                self.error("the following arguments are required: OUT")
        return namespace

    def _with_lists_cut(self, words: Sequence[str]) -> list[str]:
        """The words, the last of a list behind all others where a positional is missing."""
        words, loose, position = list(words), 0, 0
        lists = [(False, 0, 0)]  # whether its last word is of another kind, begin, end
        while position < len(words) and words[position] != "--":
            flag, value, _ = words[position].partition("=")
            action = self._option_string_actions.get(flag)
            position += 1
            if action is None:
                loose += not flag.startswith("-")
            elif action.nargs is None and not value:
                position += 1
            elif action.nargs in ("*", "+") and not value:
                begin = position
                while position < len(words) and not words[position].startswith("-"):
                    position += 1
                strange = "=" in str(action.metavar) and "=" not in words[position - 1]
                lists.append((strange, begin, position))
        missing = self._needed(words) - loose - len(words[position + 1 :])
        _, begin, end = max(
            found for found in lists if found[2] - found[1] > missing or not found[2]
        )
        if not missing and end - begin > 1 and self._may_be_named(words[end - 1]):
            missing = 1
        if missing < 1 or not end:
            return words
        cut = [] if "--" in words else ["--"]  # else they would be in the list again
        return words[: end - missing] + words[end:] + cut + words[end - missing : end]

    def _may_be_named(self, word: str) -> bool:
        """Whether a word is meant for a place that may be empty: a checkpoint is a directory, and
        no list holds directories.
        """
        places = [action for action in self._actions if not action.option_strings]
        free = any(a.nargs == "?" and a.dest in _CHECKPOINTS for a in places)
        return free and os.path.isdir(word)

    def _needed(self, words: Sequence[str]) -> int:
        """How many words stand for themselves at least."""
        named = any(word.partition("=")[0] == "--out" for word in words)
        places = [action for action in self._actions if not action.option_strings]
        outputs = sum(isinstance(action, _Output) for action in places)
        return sum(action.nargs in (None, "+") for action in places) + outputs * (not named)


class _Output(argparse.Action):
    """OUT, by its place or by `--out`, once."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        before = getattr(namespace, self.dest, None)
        if before is not None:
            parser.error(f"OUT is given twice, as {before} and as {values}")
        setattr(namespace, self.dest, values)


def add_output(parser: argparse.ArgumentParser, dest: str, *, text: str) -> None:
    """OUT: the last word, or `--out OUT` anywhere, as verbs without such a word have it."""
    parser.add_argument(
        dest, nargs="?", default=argparse.SUPPRESS, metavar="OUT", action=_Output, help=text
    )
    parser.add_argument("--out", dest=dest, metavar="OUT", action=_Output, help="the same")


def _model_of_run(given: Any) -> Any:
    """The model in the directory of a training run that has ended; all else as it is."""
    if isinstance(given, list):
        return [_model_of_run(path) for path in given]
    run = None if given is None else Path(given)
    ended = run is not None and (run / "metrics.jsonl").is_file() and (run / "model").is_dir()
    return os.path.join(given, "model") if ended else given
