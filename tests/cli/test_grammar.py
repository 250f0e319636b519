"""Words and options in any order, and OUT in one way, for every verb."""

from __future__ import annotations

import importlib
import itertools
from pathlib import Path

import pytest

from moezoo.cli import available
from moezoo.cli.parser import Parser, _Output


def parser_of(verb: str) -> Parser:
    parser = Parser(prog=f"moezoo {verb}", allow_abbrev=False)
    importlib.import_module(f"moezoo.cli.{verb}").configure(parser)
    return parser


WRITING = [verb for verb in available() if parser_of(verb)._option_string_actions.get("--out")]


def test_options_and_texts_come_in_any_order() -> None:
    parts = [["model"], ["--num-beams", "2"], ["one", "two"], ["--scores"]]
    for order in itertools.permutations(parts):
        found = parser_of("generate").parsed([word for part in order for word in part])
        words = [word for part in order for word in part if word in ("model", "one", "two")]
        assert (found.checkpoint, *found.text) == tuple(words)
        assert (found.num_beams, found.scores) == (2, True)


@pytest.mark.parametrize("verb", ["train", "finetune", "trace", "quantize"])
def test_a_list_leaves_the_words_that_a_verb_needs(verb: str) -> None:
    parser = parser_of(verb)
    rest = {"train": ["--steps", "3"], "finetune": ["--steps", "3"]}.get(verb, [])
    flag = "--set" if verb == "finetune" else "--text"
    wanted = ["a=1", "b=2"] if verb == "finetune" else ["a.txt", "b.txt"]
    places = {
        "train": ["out"],
        "finetune": ["source", "out"],
        "trace": ["source", "target"],
    }.get(verb, ["source"])
    words = [f"the-{place}" for place in places]
    for order in ([flag, *wanted, *words, *rest], [*words, flag, *wanted, *rest]):
        found = parser.parsed(order)
        assert getattr(found, flag.strip("-")) == wanted
        assert [getattr(found, place) for place in places] == words


def test_a_list_leaves_a_directory_to_the_verb_that_may_do_without(tmp_path: Path) -> None:
    for texts in (["a.txt"], ["a.txt", "b.txt"]):
        for words in (["--text", *texts, str(tmp_path)], [str(tmp_path), "--text", *texts]):
            found = parser_of("report").parsed(words)
            assert (found.source, found.text) == (str(tmp_path), texts)
    assert parser_of("report").parsed(["--text", "a.txt", "b.txt"]).text == ["a.txt", "b.txt"]


def test_the_word_that_is_no_setting_is_the_one_given_back() -> None:
    words = ["--set", "a=1", "run", "--text", "a", "b", "--steps", "3"]
    found = parser_of("train").parsed(words)
    assert (found.set, found.text, found.out) == (["a=1"], ["a", "b"], "run")


def test_every_verb_that_writes_takes_its_output_by_the_option() -> None:
    assert {"upcycle", "downcycle", "grow", "shrink", "export", "train", "finetune"} <= set(WRITING)
    assert {"merge", "report", "demo"} <= set(WRITING)


@pytest.mark.parametrize("verb", WRITING)
def test_the_output_is_the_last_word_or_an_option_but_not_both(
    verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = parser_of(verb)
    outputs = [action for action in parser._actions if isinstance(action, _Output)]
    if not outputs:
        return  # by --out alone, as in merge: its words are all sources
    sources = sum(not a.option_strings and not isinstance(a, _Output) for a in parser._actions)
    must = {"shrink": ["--experts", "2"], "train": ["--steps", "1"], "finetune": ["--steps", "1"]}
    words = ["s"] * sources + must.get(verb, [])
    for given in ([*words, "o"], ["--out", "o", *words], [*words, "--out=o"]):
        assert getattr(parser.parsed(given), outputs[0].dest) == "o"
    for given, reason in (
        ([*words, "o", "--out", "p"], "given twice"),
        (words, "the following arguments are required: OUT"),
    ):
        with pytest.raises(SystemExit) as left:
            parser.parsed(given)
        assert left.value.code == 2 and reason in capsys.readouterr().err


def test_what_follows_two_dashes_is_a_text(tmp_path: Path) -> None:
    found = parser_of("generate").parsed(["model", "--scores", "--", "-1 degree", "--cold"])
    assert found.text == ["-1 degree", "--cold"] and found.scores
