"""What a message tells a user to type can be typed."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

import moezoo
from moezoo import traces
from moezoo.cli import available, main
from moezoo.cli.parser import Parser
from moezoo.errors import MissingExtra
from tests.imports import SOURCES

OF_OTHERS = {"--local-dir", "--nproc-per-node", "--max-restarts"}  # `hf download`, torchrun


def flags() -> set[str]:
    found: set[str] = set()
    for verb in available():
        parser = Parser(prog=verb)
        importlib.import_module(f"moezoo.cli.{verb}").configure(parser)
        found |= set(parser._option_string_actions)
    return found


def test_an_option_in_a_message_is_one_of_some_verb() -> None:
    known = flags() | OF_OTHERS | {"--version", "--debug"}
    for path in SOURCES:
        for word in re.findall(r"(?<![\w-])--[a-z][a-z-]+", path.read_text(encoding="utf-8")):
            assert word in known, f"{path}: {word}"


def test_a_verb_in_a_message_is_one() -> None:
    for path in SOURCES:
        for word in re.findall(r"`moezoo ([a-z]+)", path.read_text(encoding="utf-8")):
            assert word in available(), f"{path}: moezoo {word}"


def test_what_an_extra_brings_is_said_as_it_can_be_installed() -> None:
    names = Path(__file__).parents[2].joinpath("pyproject.toml").read_text()
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        assert "pip install moezoo" not in text and "pip install 'moezoo" not in text, path
        for extra in re.findall(r"extra=\"(\w+)\"|how_to_install\([\"'](\w+)", text):
            assert re.search(f"^{''.join(extra)} = ", names, re.MULTILINE), (path, extra)
    lack = MissingExtra("BLEU", "sacrebleu", extra="train")
    assert str(lack) == (
        "BLEU needs sacrebleu, which is missing. "
        "In the folder of moezoo's sources: pip install '.[train]'"
    )
    assert isinstance(lack, (ValueError, ImportError))


def test_prune_asks_for_a_trace_and_takes_the_one_that_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    config = moezoo.SwitchConfig(
        vocab_size=384, d_model=16, d_kv=4, d_ff=16, num_heads=2, num_layers=2, num_experts=4
    )
    moezoo.save(moezoo.build(config, seed=0), "switch")
    assert main(["shrink", "switch", "pruned", "--experts", "2", "--method", "prune"]) == 2
    assert "Record one: `moezoo trace`" in capsys.readouterr().err
    words = ["--tokenizer", "bytes", "--batches", "2", "--length", "24", "--probs"]
    assert main(["trace", *words, "switch", "routing.safetensors"]) == 0
    trace = traces.load("routing.safetensors")
    assert [len(calls) for calls in trace.by_layer.values()] == [2, 2]
    assert all(call.probs is not None for calls in trace.by_layer.values() for call in calls)
    words = ["--experts", "2", "--method", "prune", "--trace", "routing.safetensors"]
    assert main(["shrink", "switch", "pruned", *words]) == 0
    assert moezoo.load("pruned").config.num_experts == 2
