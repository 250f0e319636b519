"""benchmarks/evidence.py: what it has measured belongs to its tables, and goes on where it
stopped.
"""

from __future__ import annotations

import gzip
import json
import pydoc_data.topics
from pathlib import Path
from typing import Any

import pytest

import moezoo
from benchmarks import evidence_text
from benchmarks.evidence import RESULTS, TABLES, TEXTS
from benchmarks.evidence_facts import Book
from benchmarks.evidence_page import below_from, page
from benchmarks.evidence_text import Text
from benchmarks.evidence_tuning import SEEDS, Trial, best_rate, run
from benchmarks.manual_pages import pages, plain
from benchmarks.reproductions import read
from moezoo.demonstration.closed_book import Moment
from moezoo.errors import ConfigError


class Parabola:
    """A task whose trials come to an end at once: the best rate is `best`."""

    def __init__(self, best: float) -> None:
        self.best = best
        self.measured: list[tuple[float, int]] = []

    def key(self, trial: Trial, rate: float, seed: int) -> str:
        return json.dumps({"steps": trial.steps, "rate": rate, "seed": seed})

    def rates(self, trial: Trial) -> tuple[float, ...]:
        return (1.0, 2.0, 4.0)

    def measure(self, trial: Trial, rate: float, seed: int) -> dict[str, Any]:
        self.measured.append((rate, seed))
        return {"end": -((rate - self.best) ** 2)}

    def moments(self, row: dict[str, Any]) -> tuple[Moment, ...]:
        return (Moment(1, 1.0, row["end"]),)


@pytest.mark.parametrize("best", [0.5, 2.0, 16.0])
def test_rates_are_tried_until_the_best_is_between_others_and_then_run_on_every_seed(
    best: float, tmp_path: Path
) -> None:
    task, trial, out = Parabola(best), Trial(), tmp_path / "rows.jsonl"
    list(run(task, trial, out))
    rates = {rate for rate, seed in task.measured if seed == SEEDS[0]}
    assert {best / 2, best, 2 * best} <= rates
    assert best_rate(task, trial, read(out)) == best
    assert sorted(seed for rate, seed in task.measured if rate == best) == list(SEEDS)
    assert all(seed == SEEDS[0] for rate, seed in task.measured if rate != best)


def test_what_is_finished_is_not_run_again(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    list(run(Parabola(2.0), Trial(), out))
    lines = out.read_text().splitlines(keepends=True)
    out.write_text("".join(lines[:-1]))
    again = Parabola(2.0)
    list(run(again, Trial(), out))
    assert again.measured == [(2.0, SEEDS[-1])]
    assert out.read_text().splitlines(keepends=True) == lines


def test_every_recorded_trial_belongs_to_a_table() -> None:
    rows = read(RESULTS)
    found = {json.loads(row["key"]).get("text") for row in rows} - {None}
    assert len(found) == 1, "of one text"
    text = Text(None, *found)
    keys = {
        (text if name in TEXTS else Book()).key(trial, row["rate"], row["seed"])
        for name, trials in TABLES.items()
        for trial in trials.values()
        for row in rows
    }
    assert {row["key"] for row in rows} <= keys


def test_the_page_holds_what_was_recorded(tmp_path: Path) -> None:
    page(TABLES, read(RESULTS), tmp_path / "page.md")
    made, kept = (tmp_path / "page.md").read_text(), RESULTS.with_suffix(".md").read_text()
    without_machine = [
        [line for line in text.splitlines() if "CPU cores" not in line] for text in (made, kept)
    ]
    assert without_machine[0] == without_machine[1]


def test_a_curve_is_ahead_from_where_it_stays_so() -> None:
    def curve(*values: float) -> tuple[Moment, ...]:
        return tuple(Moment(100 * i, 0.0, value) for i, value in enumerate(values))

    dense = curve(0, 1, 2, 3)
    assert below_from(curve(0, 2, 1, 4), dense) == 300
    assert below_from(curve(0, 0, 3, 4), dense) == 200
    assert below_from(curve(9, 9, 9, 3), dense) is None


def write_text(path: Path, documents: int = 40) -> Path:
    topics: dict[str, str] = pydoc_data.topics.topics
    texts = [topics[name] for name in sorted(topics)[:documents]]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def test_text_is_learned_from_the_parents_weights_and_refused_where_it_would_repeat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {**evidence_text.SIZES, "vocab_size": 256}
    monkeypatch.setattr(evidence_text, "SIZES", sizes)
    monkeypatch.setattr(evidence_text, "BATCH_SIZE", 4)
    monkeypatch.setattr(evidence_text, "STEPS", 20)
    monkeypatch.setattr(evidence_text, "PARENT_RATE", 8e-3)
    task = Text(write_text(tmp_path / "text.jsonl"))
    dense = task.measure(Trial(scratch={}, steps=20), evidence_text.PARENT_RATE, 0)
    unit = {"num_experts": 2, "layers": "all", "router": {"name": "switch", "weight": "unit"}}
    upcycled = task.measure(Trial(upcycle=unit, steps=20), 8e-3, 0)
    before, after = dense["curve"][0]["loss"], dense["curve"][-1]["loss"]
    assert after < before
    assert upcycled["curve"][0]["loss"] == pytest.approx(after, abs=1e-4), "exact at step 0"
    assert upcycled["parameters"] > dense["parameters"]
    assert [moment.step for moment in task.moments(dense)] == list(range(0, 21, 2))
    again = Text(tmp_path / "text.jsonl").measure(Trial(scratch={}, steps=20), 8e-3, 0)
    losses = ([m["loss"] for m in row["curve"]] for row in (dense, again))
    assert next(losses) == next(losses)
    with pytest.raises(ConfigError, match="the text would repeat"):
        task.measure(Trial(steps=10_000), 8e-3, 0)


def test_widening_starts_from_the_papers_variance_whatever_the_default_is() -> None:
    fields = {"num_experts": 4, "encoder_sparse_layers": "all"}
    task = Text(None)
    wide, narrow = (
        task._model(Trial(scratch=fields, widen=factor), 0).state_dict() for factor in (10.0, 1.0)
    )
    name = "encoder.blocks.0.mlp.experts.wo"
    assert float(narrow[name].var() * 64) == pytest.approx(0.1, rel=0.1)
    assert float(wide[name].var() * 64) == pytest.approx(1.0, rel=0.1)
    config = moezoo.SwitchConfig(**{**evidence_text.SIZES, **fields})
    default = moezoo.build(config, seed=0).state_dict()
    assert float((default[name] - wide[name]).abs().max()) < 1e-5


PAGE = r""".\" a comment
.TH LS 1 "2022" "GNU"
.SH NAME
ls \- list \fBdirectory\fP contents
.PP
.B \-a\fR, \fB\-\-all\fP \" another
.if n .nh
do \(aqnot\(aq ignore \[lq]entries\[rq] of C:\e\*(Aqx
"""


def test_a_manual_page_is_its_words() -> None:
    assert plain(PAGE).splitlines() == [
        "NAME",
        "ls - list directory contents",
        "-a, --all",
        "do 'not' ignore entries of C:\\x",
    ]


def test_pages_come_once_in_a_fixed_order_and_only_in_utf8(tmp_path: Path) -> None:
    for name, text in (("a", "eins " * 99), ("b", "zwei " * 99), ("c", "zwei " * 99), ("d", "x")):
        (tmp_path / f"{name}.1.gz").write_bytes(gzip.compress(f".SH {text}".encode()))
    (tmp_path / "e.1.gz").write_bytes(gzip.compress(b"\xff" * 900))
    (tmp_path / "f.1.gz").symlink_to(tmp_path / "a.1.gz")
    found = list(pages(tmp_path))
    assert sorted(text.split()[0] for text in found) == ["eins", "zwei"]
    assert list(pages(tmp_path)) == found
