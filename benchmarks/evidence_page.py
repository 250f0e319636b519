"""benchmarks/evidence.md: every table that has trials, over seeds, against its dense row."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from statistics import mean

from benchmarks import evidence_facts, evidence_text
from benchmarks.evidence_facts import Book
from benchmarks.evidence_text import Text
from benchmarks.evidence_tuning import SEEDS, Row, Task, Trial, best_rate, of_seeds
from benchmarks.tables import machine, table
from moezoo.demonstration.closed_book import Learner, Moment, spread
from moezoo.training.facts import Facts

ROOT = Path(__file__).resolve().parents[1]
Tables = Mapping[str, Mapping[str, Trial]]
_AFTER = f"Upcycled after {evidence_facts.PARENT_STEPS:,} steps, {evidence_facts.STEPS} further"
_TEXT_AFTER = f"Text: upcycled after {evidence_text.STEPS:,} steps, as many further"
TITLES = {
    "upcycling": _AFTER,
    "scratch": "From scratch",
    "larger": "From scratch, d_model 64",
    "adafactor": f"{_AFTER}, Adafactor",
    "text": "Text: from scratch",
    "text-upcycling": _TEXT_AFTER,
}
_COMMON = ["steps to dense's end", "seconds to it", "seconds", "parameters"]
_FACTS = ["", "best rate", "recall", *_COMMON, "tokens that stay"]
_TEXTS = ["", "best rate", "held-out loss", "minus dense", "below dense from step", *_COMMON]


def page(tables: Tables, rows: list[Row], path: Path) -> None:
    """Write every table of which a row has all seeds."""
    facts = {name: trials for name, trials in tables.items() if not name.startswith("text")}
    texts = {name: trials for name, trials in tables.items() if name not in facts}
    parts = [_facts_words(), *(_section(n, t, Book(), rows) for n, t in facts.items())]
    text = Text(None, _last_text(rows))
    sections = [_section(name, trials, text, rows) for name, trials in texts.items()]
    if any(sections):
        parts += [_text_words(), *sections]
    path.write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")


def _facts_words() -> str:
    rates = ", ".join(f"{rate:g}" for rate in evidence_facts.RATES)
    count = evidence_facts.COUNT
    return (
        "# Evidence\n\n`python -m benchmarks.evidence`; "
        f"{count:,} facts ({Facts(count).bits / 1000:.0f} kbit), d_model 32, d_ff 64, 1 + 1 "
        f"layers, every layer sparse, batches of 512, AdamW, linear decay to 0, each row at its "
        f"best rate of {rates} on seed {SEEDS[0]}; mean (least to most) "
        f"of {len(SEEDS)} seeds. Seconds are of the processor.\n\n{machine()}"
    )


def _text_words() -> str:
    sizes, batch = evidence_text.SIZES, evidence_text.BATCH_SIZE
    return (
        "## Text that never repeats\n\n"
        "`python -m benchmarks.evidence text text-upcycling --text FILE`: span corruption on "
        "manual pages in some twenty languages (`benchmarks/manual_pages.py` says how FILE was "
        f"made), d_model {sizes['d_model']}, d_ff {sizes['d_ff']}, 1 + 1 layers, every layer "
        f"sparse, a vocabulary of {sizes['vocab_size']:,}, batches of {batch} x "
        f"{evidence_text.INPUT_LENGTH} source tokens, {evidence_text.STEPS:,} steps, no text "
        "twice, else as above. Loss in nats per target token, on pages that no model was trained "
        "on; their translations may have been. Making batches and measuring are not in seconds."
    )


def _last_text(rows: list[Row]) -> str:
    """The digest of the text of the last row that has one."""
    found = [json.loads(row["key"]).get("text", "") for row in rows]
    return next((digest for digest in reversed(found) if digest), "")


def _section(name: str, trials: Mapping[str, Trial], task: Task, rows: list[Row]) -> str:
    dense = trials.get("dense, 3,200 steps", next(iter(trials.values())))
    goal = of_seeds(task, dense, rows)
    line = _text_row if isinstance(task, Text) else _facts_row
    body = [line(label, trial, task, rows, goal) for label, trial in trials.items()]
    head = _TEXTS if isinstance(task, Text) else _FACTS
    body = [cells for cells in body if cells]
    level = "###" if isinstance(task, Text) else "##"
    image = f"![{TITLES[name]}](../{picture_of(name).relative_to(ROOT)})"
    return f"{level} {TITLES[name]}\n\n{table(head, body)}\n\n{image}" if body else ""


def picture_of(name: str) -> Path:
    """Where the picture of a table is."""
    return ROOT / "docs" / "images" / f"evidence-{name}.png"


def pictures(tables: Tables, rows: list[Row]) -> None:
    """Draw every table of which a row has all seeds."""
    # matplotlib is a second's import, and a page needs none.
    from benchmarks.evidence_picture import draw

    for name, trials in tables.items():
        on_text = name.startswith("text")
        task: Task = Text(None, _last_text(rows)) if on_text else Book()
        seeds = {label: of_seeds(task, trial, rows) for label, trial in trials.items()}
        curves = {
            label: [task.moments(row) for row in found.values()]
            for label, found in seeds.items()
            if len(found) == len(SEEDS)
        }
        if curves and on_text:
            curves = {label: [_losses(c[1:]) for c in found] for label, found in curves.items()}
        if curves:
            what = "held-out loss, nats" if on_text else "facts recalled"
            draw(curves, what, picture_of(name))


def _losses(curve: tuple[Moment, ...]) -> tuple[Moment, ...]:
    return tuple(replace(moment, recall=-moment.recall) for moment in curve)


def _facts_row(
    label: str, trial: Trial, task: Task, rows: list[Row], goal: dict[int, Row]
) -> list[str]:
    found = of_seeds(task, trial, rows)
    if len(found) < len(SEEDS):
        return []
    stay = [row["stayed"] for row in found.values() if row["stayed"] is not None]
    return [
        label,
        f"{best_rate(task, trial, rows):g}",
        spread([task.moments(row)[-1].recall for row in found.values()], ".3f"),
        *_common(task, found, goal),
        f"{mean(stay):.0%}" if stay else "-",
    ]


def _text_row(
    label: str, trial: Trial, task: Task, rows: list[Row], goal: dict[int, Row]
) -> list[str]:
    found = of_seeds(task, trial, rows)
    if len(found) < len(SEEDS) or len(goal) < len(SEEDS):
        return []
    ends = {seed: -task.moments(row)[-1].recall for seed, row in found.items()}
    before = {seed: -task.moments(row)[-1].recall for seed, row in goal.items()}
    apart = [ends[seed] - before[seed] for seed in SEEDS]
    passed = [below_from(task.moments(found[s]), task.moments(goal[s])) for s in SEEDS]
    return [
        label,
        f"{best_rate(task, trial, rows):g}",
        spread([*ends.values()], ".3f"),
        spread(apart, "+.3f") if any(apart) else "",
        spread([float(step or 0) for step in passed], ".0f") if all(passed) else "-",
        *_common(task, found, goal),
    ]


def below_from(curve: tuple[Moment, ...], dense: tuple[Moment, ...]) -> int | None:
    """The first measured step from which on a curve stays ahead of dense's; None: it is not at the
    end.
    """
    ahead = None
    for own, other in zip(reversed(curve), reversed(dense), strict=True):
        if own.recall <= other.recall:
            break
        ahead = own.step
    return ahead


def _common(task: Task, found: dict[int, Row], goal: dict[int, Row]) -> list[str]:
    """Steps and seconds to dense's end of the same seed, seconds in all, and parameters."""
    moments = []
    for seed, row in found.items():
        learner = Learner("", seed, 0, 0, task.moments(row))
        end = task.moments(goal[seed])[-1].recall if seed in goal else None
        moments.append(None if end is None else learner.reaches(end))
    reached = [moment for moment in moments if moment is not None]
    all_reach = len(reached) == len(moments)
    return [
        spread([float(m.step) for m in reached], ".0f") if all_reach else "-",
        spread([m.seconds for m in reached], ".1f") if all_reach else "-",
        f"{mean(task.moments(row)[-1].seconds for row in found.values()):.1f}",
        f"{next(iter(found.values()))['parameters']:,}",
    ]
